"""Products and layers with int8 weights: against float, and against other int8."""

import contextlib
import copy
import functools
import warnings

import peers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmos_kernels as lk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
#: rows, in, out; goals on two cores: provider and dtype to ratio.
SIZES = {
    (128, 384, 1536): {"dynamic": 1.4},
    (512, 1024, 4096): {"eager bfloat16": 2.4},
    (1, 4096, 4096): {"eager bfloat16": 7.0, "int_mm bfloat16": 1.2},
    (16, 4096, 4096): {},
    (1024, 768, 3072): {},
    (1024, 3072, 768): {},
}


def dynamic(linear):
    """torch's own dynamic quantization, which takes float32 alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is deprecated for torchao.
        model = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(linear), {nn.Linear}, torch.qint8
        )
    return model[0]


def int_mm(layer, x):
    """What can be put together of torch's ops: quantise, torch._int_mm, scale."""
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    rows = (x / scale).round().to(torch.int8)
    sums = torch._int_mm(rows, layer.weight_int8.t())
    return (sums.float() * scale * layer.weight_scale + layer.bias).to(x.dtype)


def relative(actual, exact):
    return round(((actual.double() - exact).norm() / exact.norm()).item(), 4)


def goals(wanted, calls, dtype):
    """The ratios to reach on a CPU, of those for this dtype, against who is there."""
    named = {k.removesuffix(f" {str(dtype)[6:]}"): v for k, v in wanted.items()}
    return {k: v for k, v in named.items() if k in calls and DEVICE == "cpu"} or None


@each_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear(size, dtype, compare):
    torch.manual_seed(0)
    rows, inner, outer = size
    x = torch.randn(rows, inner, device=DEVICE, dtype=dtype)
    linear = nn.Linear(inner, outer, device=DEVICE, dtype=dtype)
    layer = lk.nn.Int8Linear.from_linear(linear)
    with torch.inference_mode():
        calls = {"kernel": functools.partial(layer, x), "eager": functools.partial(linear, x)}
        calls["int_mm"] = functools.partial(int_mm, layer, x)
        if dtype == torch.float32 and DEVICE == "cpu":
            calls["dynamic"] = functools.partial(dynamic(linear), x)
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        found = {k: relative(call(), exact) for k, call in calls.items()}
        assert max(found.values()) < 0.03
        moved = x.nbytes + layer.weight_int8.nbytes + rows * outer * x.element_size()
        name = f"int8 linear {list(size)} {str(dtype)[6:]}"
        compare(name, calls, moved=moved, errors=found, goals=goals(SIZES[size], calls, dtype))


@each_dtype
@pytest.mark.parametrize("rows", (1, 4, 16))
def test_weight_only(rows, dtype, compare):
    torch.manual_seed(0)
    x = torch.randn(rows, 4096, device=DEVICE, dtype=dtype)
    linear = nn.Linear(4096, 4096, device=DEVICE, dtype=dtype)
    layer = lk.nn.Int8Linear.from_linear(linear, "weight_only")
    with torch.inference_mode():
        calls = {"kernel": functools.partial(layer, x), "eager": functools.partial(linear, x)}
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        found = {k: relative(call(), exact) for k, call in calls.items()}
        assert max(found.values()) < 0.03
        moved = x.nbytes + layer.weight_int8.nbytes + rows * 4096 * x.element_size()
        wanted = {"eager bfloat16": 6.0} if rows == 1 else {}
        name = f"int8 linear, weight only [{rows}, 4096, 4096] {str(dtype)[6:]}"
        compare(name, calls, moved=moved, errors=found, goals=goals(wanted, calls, dtype))


@each_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outliers(size, dtype, compare):
    """One column in a hundred beyond the threshold, against none beyond it."""
    torch.manual_seed(0)
    rows, inner, outer = size
    plain = torch.randn(rows, inner, device=DEVICE, dtype=dtype).clamp(-5, 5)
    x = plain.clone()
    x[:, ::100] *= 40
    linear = nn.Linear(inner, outer, device=DEVICE, dtype=dtype)
    layer = lk.nn.Int8Linear.from_linear(linear, outlier_threshold=6.0)
    with torch.inference_mode():
        calls = {"kernel": lambda: layer(x), "plain": lambda: layer(plain)}
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        found = {"kernel": relative(layer(x), exact)}
        assert found["kernel"] < 0.03
        moved = x.nbytes + layer.weight_int8.nbytes + rows * outer * x.element_size()
        name = f"int8 linear, 1 % outliers {list(size)} {str(dtype)[6:]}"
        compare(name, calls, moved=moved, errors=found, goals=goals({"plain": 0.8}, calls, dtype))


@each_dtype
def test_encoder_layers(dtype, compare):
    """Two layers of BERT, attention and all, against other libraries' int8 models."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=768, num_attention_heads=12, num_hidden_layers=2,
        intermediate_size=3072, return_dict=False,
    )  # fmt: skip
    stock = transformers.BertModel(config, add_pooling_layer=False).to(DEVICE, dtype).eval()
    ids = torch.randint(100, (8, 128), device=DEVICE)
    model = copy.deepcopy(stock)
    lk.optimize(model, verify=False)
    swapped = copy.deepcopy(model)
    lk.quantize(model, always=True, rows=(128,))
    with torch.no_grad(), contextlib.ExitStack() as stack:
        exact = copy.deepcopy(stock).double()(ids)[0]
        calls = {"kernel": lambda: model(ids), "eager": lambda: stock(ids)}
        calls["swapped"] = lambda: swapped(ids)
        found = {k: relative(call()[0], exact) for k, call in calls.items()}
        versions = {}
        for other in peers.available(int8=True) if DEVICE == "cpu" else ():
            if other == "onnxruntime_int8" and dtype != torch.float32:
                continue  # It has no bfloat16 around its int8 on CPUs.
            peer = calls[other] = peers.Peer(other, stock, (ids,))
            stack.callback(peer.close)
            found[other] = relative(peer.result, exact)
            versions |= peer.versions
        assert max(found.values()) < 0.03, found
        wanted = {"onnxruntime_int8": 1.25, "torchao": 1.15, "bitsandbytes": 4.0}
        compare(
            f"2 int8 BERT layers [768, 12, 3072, 8, 128] {str(dtype)[6:]}",
            calls,
            moved=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
            rounds=15,
            errors=found,
            versions=versions,
            goals=goals(wanted, calls, dtype),
        )
