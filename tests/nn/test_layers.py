"""Feed-forward blocks and Transformer layers, compared with torch's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmos_kernels as lk
from llmos_kernels.testing import DTYPES, assert_accurate, make_gradients

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BATCH, LENGTH, MEMORY, WIDTH = 3, 12, 17, 32
LAYERS = {
    nn.TransformerEncoderLayer: lk.nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: lk.nn.TransformerDecoderLayer,
}
each_layer = pytest.mark.parametrize("plain", LAYERS, ids=lambda c: c.__name__)


def square(x):
    """Return x * x, an activation that no kernel has."""
    return x * x


def build(plain, ours=False, **options):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "dim_feedforward": 48, "batch_first": True} | options
    layer = (LAYERS[plain] if ours else plain)(WIDTH, 4, **options)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def causal(kind):
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return mask if kind == "bool" else torch.zeros(LENGTH, LENGTH).masked_fill(mask, -torch.inf)


def padding(length, kind):
    ignored = torch.arange(length) >= torch.tensor([[length], [length // 2], [3]])
    return (
        ignored if kind == "bool" else torch.zeros(ignored.shape).masked_fill(ignored, -torch.inf)
    )


def inputs(plain, kind=None, dtype=torch.float32, batch_first=True):
    """Return the arguments of a layer by name; ``kind`` is the dtype of the masks, or None."""
    torch.manual_seed(1)
    shapes = {"src": (BATCH, LENGTH, WIDTH)}
    if plain is nn.TransformerDecoderLayer:
        shapes = {"tgt": (BATCH, LENGTH, WIDTH), "memory": (BATCH, MEMORY, WIDTH)}
    given = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, dtype=dtype)
        given[name] = (x if batch_first else x.transpose(0, 1)).requires_grad_()
    masks = {}
    if kind:
        first = next(iter(shapes))
        masks = {f"{first}_mask": causal(kind), f"{first}_key_padding_mask": padding(LENGTH, kind)}
        if first == "tgt":
            masks["memory_key_padding_mask"] = padding(MEMORY, kind)
    masks = {k: m if m.dtype == torch.bool else m.to(dtype) for k, m in masks.items()}
    return given | masks


def results(layer, given, dtype=None):
    """Return the output and the gradients of inputs and parameters, by name."""
    layer = copy.deepcopy(layer).to(dtype or next(layer.parameters()).dtype)
    given = {
        k: v.detach().to(dtype or v.dtype).requires_grad_(v.requires_grad)
        if v.is_floating_point()
        else v
        for k, v in given.items()
    }
    out = layer(**given)
    leaves = {k: v for k, v in given.items() if v.requires_grad} | dict(layer.named_parameters())
    gradients = torch.autograd.grad(out, leaves.values(), make_gradients([out]))
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


def check(layer, plain, given):
    actual, eager = results(layer, given), results(plain, given)
    exact = results(plain, given, torch.float64)
    for name, value in actual.items():
        assert_accurate(value, exact[name], eager[name], name)


@each_dtype
@pytest.mark.parametrize("kind", [None, "bool", "float"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@each_layer
def test_is_torchs_layer(plain, norm_first, kind, dtype):
    # In 16 bits a pre-activation near 0 may round to either side, where relu's gradient jumps.
    activation = "relu" if dtype == torch.float32 else "gelu"
    options = {"norm_first": norm_first, "dtype": dtype, "activation": activation}
    layer, torchs = build(plain, True, **options), build(plain, **options)
    assert isinstance(layer, plain) and layer.state_dict().keys() == torchs.state_dict().keys()
    check(layer, torchs, inputs(plain, kind, dtype))


OPTIONS = {
    "gelu": {"activation": "gelu"},
    "silu": {"activation": F.silu},
    "gelu_tanh": {"activation": nn.GELU("tanh")},
    "unknown": {"activation": square},
    "no bias": {"bias": False},
    "batch second": {"batch_first": False},
    "eps": {"layer_norm_eps": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_layer
def test_options(plain, options):
    given = inputs(plain, "bool", batch_first=options.get("batch_first", True))
    check(build(plain, True, **options), build(plain, **options), given)


@each_layer
def test_dropout(plain):
    """Dropout is replayed from the seed; on average it gives what torch's layer gives."""
    layer, given = build(plain, True, dropout=0.1), inputs(plain)
    stock = build(plain, dropout=0.1)

    def run(seed, layer=layer):
        torch.manual_seed(seed)
        return layer(**given).detach()

    assert torch.equal(run(5), run(5)) and not torch.equal(run(5), run(6))
    mean = torch.stack([run(i) for i in range(300)]).mean(0)
    expected = torch.stack([run(i, stock) for i in range(300)]).mean(0)
    assert (mean - expected).abs().mean() < 0.05 * expected.abs().mean()
    layer.eval()
    assert torch.equal(run(5), run(6))
    with pytest.raises(ValueError, match=r"1\.5"):
        build(plain, True, dropout=1.5)


@each_layer
def test_what_hangs_on_a_part_is_called(plain):
    """Hooks of submodules run, and submodules of other classes are called."""
    layer, given = build(plain, True), inputs(plain)
    expected, seen = layer(**given), []
    for part in ("linear1", "dropout", "dropout1", "norm1", "norm2"):
        handle = getattr(layer, part).register_forward_hook(lambda *_, part=part: seen.append(part))
        torch.testing.assert_close(layer(**given), expected)
        assert seen.pop() == part
        handle.remove()

    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    layer.linear1.__class__ = Doubled
    with torch.no_grad():
        layer.linear1.bias /= 2
        layer.linear1.weight /= 2
    torch.testing.assert_close(layer(**given), expected)


@pytest.mark.filterwarnings("ignore:(enable_nested|The PyTorch API of nested)")
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("inference", [False, True])
def test_whole_models(norm_first, inference):
    """torch's encoders and decoders are swapped whole, also where torch uses nested tensors."""
    torch.manual_seed(0)
    options = {"dim_feedforward": 48, "norm_first": norm_first, "batch_first": True}
    model = nn.Transformer(WIDTH, 4, 2, 2, dropout=0.0, **options).eval()
    src, tgt = torch.randn(BATCH, MEMORY, WIDTH), torch.randn(BATCH, LENGTH, WIDTH)
    ignored = padding(MEMORY, "bool")

    def run():
        with torch.inference_mode(inference):
            return model(
                src,
                tgt,
                tgt_mask=causal("float"),
                src_key_padding_mask=ignored,
                memory_key_padding_mask=ignored,
                tgt_is_causal=True,
            )

    before = run()
    report = lk.optimize(model, always=True)
    kinds = {"TransformerEncoderLayer", "TransformerDecoderLayer"}
    assert not report.kept and kinds <= {e.cls for e in report.swapped}
    torch.testing.assert_close(run(), before)
    with torch.inference_mode():
        encoded = model.encoder(src, src_key_padding_mask=ignored)
    # As in torch, post-norm encoders use nested tensors in inference, which pad with zeros.
    assert (encoded[ignored] == 0).all() != norm_first
    lk.restore(model)
    assert torch.equal(run(), before)
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer


@pytest.mark.parametrize("activation", [None, "relu", "relu2", "gelu", "gelu_tanh", "silu"])
def test_feed_forward_block(activation):
    block = lk.nn.FeedForward(16, 40, activation, dropout=0.5).eval()
    x = torch.randn(2, 5, 16)
    by_hand = lk.linear(x, block.linear1.weight, block.linear1.bias, activation)
    expected = F.linear(by_hand, block.linear2.weight, block.linear2.bias)
    torch.testing.assert_close(block(x), expected)
    assert list(block.state_dict()) == [
        f"linear{i}.{p}" for i in (1, 2) for p in ("weight", "bias")
    ]
    assert not torch.equal(block.train()(x), expected) and "0.5" in repr(block)


def test_feed_forward_refuses():
    for options, message in (({"activation": "swish"}, "swish"), ({"dropout": 1.0}, "1.0")):
        with pytest.raises(ValueError, match=message):
            lk.nn.FeedForward(8, 16, **options)


@each_dtype
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_decode_reads_only_what_it_needs(rows, activation, dtype, device):
    """Columns of the second weight are not read where the hidden value is 0 in every row."""
    torch.manual_seed(0)
    block = lk.nn.FeedForward(40, 300, activation, device=device, dtype=dtype)
    with torch.no_grad():
        block.linear1.bias -= 0.6
    x = torch.randn(rows, 40, device=device, dtype=dtype)
    exact, eager = (
        copy.deepcopy(block).to(t)(x.to(t)).detach() for t in (torch.float64, torch.float32)
    )
    eager = lk.feed_forward(
        x, *(p.detach() for p in block.parameters()), activation, backend="reference"
    )
    before = {k: v.clone() for k, v in block.state_dict().items()}
    block.store_for_decode()
    assert block.linear2.weight.stride() == (1, 40)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])
    hidden = F.linear(x, block.linear1.weight, block.linear1.bias)
    unused = ~(hidden > 1e-3).any(0) & (hidden < -1e-3).all(0)
    assert 100 < unused.sum() < 300
    with torch.no_grad():
        assert_accurate(block(x), exact, eager, "stored by columns")
        block.linear2.weight[:, unused] = torch.nan
        assert_accurate(block(x), exact, eager, "with NaN in what is not read")
        assert block(torch.cat([x] * 5)).isnan().all()


def test_no_copy_of_a_weight_grows_stale():
    """Layers read their parameters themselves: no change of a parameter is missed."""
    block = lk.nn.FeedForward(16, 40).eval()
    x = torch.randn(9, 16)

    def is_fresh():
        weights = [p.detach().clone() for p in block.parameters()]
        expected = lk.feed_forward(x.to(weights[0].dtype), *weights, backend="reference")
        torch.testing.assert_close(block(x.to(weights[0].dtype)), expected)
        return block(x.to(weights[0].dtype)).detach()

    first = is_fresh()
    block(x).sum().backward()
    torch.optim.SGD(block.parameters(), lr=0.1).step()
    assert not torch.equal(is_fresh(), first)
    block.linear1.weight.data.mul_(2)
    is_fresh()
    block.linear2.weight.detach().numpy()[:] = 1
    is_fresh()
    block.load_state_dict(lk.nn.FeedForward(16, 40).state_dict())
    is_fresh()
    block.bfloat16().float()
    is_fresh()
    block.linear1.weight = nn.Parameter(torch.randn(40, 16))
    is_fresh()
    assert sum(p.nbytes for p in block.state_dict().values()) == 4 * (2 * 16 * 40 + 40 + 16)


def test_one_hidden_tensor_is_saved():
    """The backward pass saves one hidden tensor, whatever the activation."""
    for activation in ("relu", "gelu", "silu"):
        block = lk.nn.FeedForward(16, 40, activation, dropout=0.1)
        kept = []

        def pack(t, kept=kept):
            kept.append(t)
            return t

        x = torch.randn(50, 16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(x)
        known_pointers = {p.data_ptr() for p in block.parameters()} | {x.data_ptr()}
        extra = [t.nbytes for t in kept if t.data_ptr() not in known_pointers]
        assert sorted(extra) == [2 * 8, 50 * 40 * 4], extra  # The seed, and the hidden tensor.


@each_dtype
@each_layer
def test_swap_is_proved_in_every_dtype(plain, dtype):
    layer = nn.ModuleList([build(plain, dtype=dtype, norm_first=first) for first in (True, False)])
    report = lk.optimize(layer, always=True)
    assert not report.kept, report
    assert {type(m) for m in layer} == {LAYERS[plain]}
    lk.restore(layer)
    assert {type(m) for m in layer} == {plain}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
@each_layer
def test_batches_of_nothing(plain, shape, padded):
    """A batch without sequences, or of sequences without tokens, gives one like it.

    torch's layer refuses a padding mask then, for a reshape with -1. Ours need not.
    """
    x = torch.randn(*shape, WIDTH, requires_grad=True)
    given = (x,) if plain is nn.TransformerEncoderLayer else (x, x)
    name = "src_key_padding_mask" if plain is nn.TransformerEncoderLayer else "tgt_key_padding_mask"
    masks = {name: torch.zeros(shape, dtype=torch.bool)} if padded else {}
    if padded:
        with pytest.raises(RuntimeError, match="reshape"):
            build(plain)(*given, **masks)
    else:
        assert build(plain)(*given).shape == x.shape
    layer = build(plain, True)
    out = layer(*given, **masks)
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
