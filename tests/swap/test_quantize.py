"""Layers and models with int8 weights: results, what is not quantized and why, checkpoints."""

import copy
import json
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import llmos_kernels as lk
from llmos_kernels.nn import Int8Linear, Int8MultiheadAttention


def make_model(nested=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture
def speedups(monkeypatch):
    """Replace timing by a list: the seconds of each call before and after."""
    found = [2.0, 1.0]
    module = sys.modules["llmos_kernels.swap.quantize"]
    monkeypatch.setattr(module, "interleaved", lambda *a, **k: list(found))
    return found


@pytest.mark.parametrize("mode", ("dynamic", "weight_only"))
@pytest.mark.parametrize("bias", (True, False))
def test_layer(mode, bias, device):
    torch.manual_seed(0)
    plain = nn.Linear(40, 24, bias, device=device)
    layer = Int8Linear.from_linear(plain, mode)
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (40, 24)
    assert list(layer.state_dict()) == ["bias", "weight_int8", "weight_scale"][not bias :]
    assert torch.equal(layer.weight, layer.weight_int8 * layer.weight_scale[:, None])
    for rows in (1, 3, 37):
        x = torch.randn(2, rows, 40, device=device, requires_grad=True)
        y = layer(x)
        assert relative(y, plain(x)) < 0.02
        expected = lk.int8_linear(x, layer.weight_int8, layer.weight_scale, layer.bias, mode=mode)
        assert torch.equal(y, expected)
        torch.testing.assert_close(layer.activated(x, "gelu"), F.gelu(y))
        torch.testing.assert_close(layer.part(x, 3, 20), y[..., 3:20])
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, layer.weight.sum(0).expand_as(gradient))
    assert not layer.weight_int8.requires_grad
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    made = Int8Linear(40, 24, bias, device, mode=mode)
    made.load_state_dict(layer.state_dict())
    assert torch.equal(made(x), y)
    assert mode in repr(layer)


def test_layer_in_other_dtypes(device):
    layer = Int8Linear.from_linear(nn.Linear(40, 24, device=device), outlier_threshold=6.0)
    scale = layer.weight_scale.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        layer.to(dtype)
        assert torch.equal(layer.weight_scale, scale) and layer.weight.dtype == dtype
        assert layer(torch.randn(20, 40, device=device, dtype=dtype)).dtype == dtype
    with torch.autocast(device, torch.bfloat16):
        assert layer(torch.randn(20, 40, device=device)).dtype == torch.bfloat16


def test_a_vnni_weight_is_never_stale():
    torch.manual_seed(0)
    layer = Int8Linear.from_linear(nn.Linear(40, 24))
    x = torch.randn(20, 40)

    def check():
        expected = lk.int8_linear(x, layer.weight_int8, layer.weight_scale, layer.bias)
        assert torch.equal(layer(x), expected)
        return expected

    before = check()
    layer.weight_int8.neg_()
    assert not torch.equal(check(), before)
    layer.weight_int8 = layer.weight_int8.roll(1, 0)
    check()
    layer.load_state_dict(Int8Linear.from_linear(nn.Linear(40, 24)).state_dict())
    check()
    for _ in range(20):  # The allocator returns the same memory again.
        for _ in range(2):
            layer.weight_int8 = torch.randint(-127, 128, (24, 40), dtype=torch.int8)
        check()
    square = Int8Linear.from_linear(nn.Linear(40, 40))
    square(x)
    square.weight_int8 = square.weight_int8.mT
    expected = lk.int8_linear(x, square.weight_int8, square.weight_scale, square.bias)
    assert torch.equal(square(x), expected)
    with torch.inference_mode():
        layer.weight_int8 = layer.weight_int8.clone()
        check()
        layer.weight_int8.neg_()
        check()


def test_compiled_layer():
    layer = Int8Linear.from_linear(nn.Linear(40, 24))
    x = torch.randn(20, 40)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            assert torch.equal(compiled(x), layer(x))
            layer.load_state_dict(Int8Linear.from_linear(nn.Linear(40, 24)).state_dict())


def test_bad_layers():
    for value in (float("nan"), float("inf")):
        plain = nn.Linear(4, 3)
        with torch.no_grad():
            plain.weight[1, 2] = value
        with pytest.raises(ValueError, match="not finite, first in row 1"):
            Int8Linear.from_linear(plain)
    with pytest.raises(ValueError, match="'static'"):
        Int8Linear(4, 3, mode="static")
    with pytest.raises(ValueError, match="-1"):
        Int8Linear(4, 3, outlier_threshold=-1)
    with pytest.raises(ValueError, match="131072 columns"):
        Int8Linear.from_linear(nn.Linear(131072, 1))
    zero = nn.Linear(4, 3)
    nn.init.zeros_(zero.weight)
    assert torch.equal(Int8Linear.from_linear(zero)(torch.randn(2, 4)), zero.bias.expand(2, 3))
    plain = nn.Linear(4, 1)
    plain.weight, plain.bias = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.empty(0))
    empty = Int8Linear.from_linear(plain)
    assert empty(torch.randn(2, 4)).shape == (2, 0)
    with pytest.raises(TypeError, match="int8"):
        block = lk.nn.FeedForward(8, 16)
        lk.quantize(block, always=True)
        block.store_for_decode()


@pytest.mark.parametrize("optimized", (False, True))
def test_whole_model(optimized, speedups):
    model = make_model()
    x, padding = torch.randn(3, 9, 32), torch.arange(9) > torch.tensor([[8], [5], [2]])
    hooked = []
    if optimized:
        lk.optimize(model, always=True)
    model.layers[0].linear1.register_forward_hook(lambda *a: hooked.append(1))
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
    parts = {name: id(m) for name, m in model.named_modules()}
    before = sum(p.nbytes for p in model.parameters())
    hooked.clear()
    report = lk.quantize(model, inputs=(x,))
    assert len(report.quantized) == 6 and not report.kept
    assert {n: id(m) for n, m in model.named_modules() if n in parts} == parts
    assert report.before == before and report.after < 0.4 * before
    for entry in report.entries:
        assert 0 < entry.error < 0.03 and entry.speedups == {1: 2.0, 128: 2.0}
        assert entry.module in str(report) and entry.after < entry.before / 3
    assert json.loads(json.dumps(report.to_dict()))["before"] == before
    assert type(model.layers[0].self_attn) is Int8MultiheadAttention
    hooked.clear()
    with torch.no_grad():
        actual = model(x, src_key_padding_mask=padding)
    assert relative(actual[~padding], expected[~padding]) < 0.05 and hooked
    # The result depends on the int8 weights, not on a float copy.
    with torch.no_grad():
        model.layers[1].linear2.weight_scale.zero_()
        assert relative(model(x), expected) > 0.1
    lk.quantize(model)  # There is nothing left to quantize.
    assert not lk.quantize(model).entries
    model(x).sum().backward()
    assert model.layers[0].linear1.bias.grad is not None


def test_attention_of_each_kind(speedups):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    attention = copy.deepcopy(plain)
    lk.quantize(attention, outlier_threshold=0)
    q, k, v = torch.randn(3, 2, 7, 32)
    attention.out_proj.register_forward_hook(lambda *a: pytest.fail("torch does not call it"))
    for given in ((q, q, q), (q, k, k), (q, k, v)):
        actual, weights = attention(*given)
        expected, wanted = plain(*given)
        assert relative(actual, expected) < 0.03 and relative(weights, wanted) < 0.03
    dense = lk.nn.MultiheadAttention(32, 4, batch_first=True)
    dense.load_state_dict(plain.state_dict())
    with torch.no_grad():
        dense.in_proj_weight.copy_(attention.in_proj_weight)
        dense.out_proj.weight.copy_(attention.out_proj.weight)
    assert relative(attention(q, k, v)[0], dense(q, k, v)[0]) < 0.03
    assert torch.equal(attention.in_proj_bias, plain.in_proj_bias)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(speedups):
    """Padded batches are accurate in inference, where torch's encoder makes them nested."""
    stock = make_model(nested=True)
    x, padding = torch.randn(3, 9, 32), torch.arange(9) > torch.tensor([[8], [5], [2]])
    for optimized in (False, True):
        model = copy.deepcopy(stock)
        if optimized:
            lk.optimize(model, always=True)
        lk.quantize(model)
        with torch.no_grad():
            actual = model(x, src_key_padding_mask=padding)[~padding]
            expected = stock(x, src_key_padding_mask=padding)[~padding]
        assert relative(actual, expected) < 0.05


def test_fused_blocks(speedups):
    """Activations are fused into the int8 product, and the second layer is called."""
    torch.manual_seed(0)
    x = torch.randn(5, 32)
    for stock in (
        nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
        lk.nn.FeedForward(32, 64, "relu"),
    ):
        model = copy.deepcopy(stock)
        lk.optimize(model, always=True)
        lk.quantize(model)
        first, second = (m for m in model.modules() if type(m) is Int8Linear)
        name = "relu" if isinstance(model, lk.nn.FeedForward) else "gelu"
        assert torch.equal(model(x), second(first.activated(x, name)))
        assert relative(model(x), stock(x)) < 0.05


def test_what_is_kept(speedups):
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.tied = nn.Linear(8, 10, bias=False)
            self.tied.weight = self.embedding.weight
            self.derived, self.plain, self.lm_head = Own(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.double = nn.Linear(8, 8).double()
            self.replaced = nn.Linear(8, 8)
            self.replaced.forward = lambda x: x
            self.widths = nn.MultiheadAttention(8, 2, kdim=4)
            self.part = nn.ModuleDict({"inner": nn.Linear(8, 8)})
            self.pruned = prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5)
            self.first, self.second = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
            self.second.out_proj = self.first.out_proj
            self.other = nn.MultiheadAttention(8, 2)
            self.other.out_proj = Own(8, 8)
            self.cut = prune.random_unstructured(nn.MultiheadAttention(8, 2), "in_proj_weight", 0.5)
            self.named = nn.MultiheadAttention(8, 2)

    model = Model()
    report = lk.quantize(model, skip=("lm_head", "part", "named.out_proj"))
    assert [e.module for e in report.quantized] == ["plain"]
    reasons = {e.module: e.reason for e in report.kept}
    assert reasons == {
        "tied": "its weight is that of embedding too",
        "derived": "Own is a subclass of Linear and may compute something else",
        "lm_head": "skip names it",
        "part.inner": "skip names it",
        "double": "no kernel for torch.float64",
        "replaced": "its forward has been replaced on the instance",
        "widths": "its query, key and value have different widths",
        "pruned": "its weight is no parameter of its own (a parametrization, or pruning)",
        "first": "its out_proj is another module's too",
        "second": "its out_proj is another module's too",
        "other": "its out_proj is a Own",
        "cut": "its weights are no parameters of its own (a parametrization, or pruning)",
        "named": "skip names its out_proj",
    }
    speedups[:] = 1.0, 1.5
    model = Model()
    (slow,) = (e for e in lk.quantize(model, rows=(3,)).kept if e.module == "plain")
    assert slow.reason == "int8 is not faster: 0.67x at 3 rows" and type(model.plain) is nn.Linear
    assert "plain" in [e.module for e in lk.quantize(model, always=True).quantized]
    assert not lk.quantize(nn.Sequential(nn.Linear(4, 4)), skip="0").quantized
    with torch.inference_mode():  # The weight must not be an inference tensor, which cannot train.
        layer = nn.Linear(4, 4)
        lk.quantize(layer, always=True)
    assert not layer.weight_int8.is_inference()


def test_bad_models():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[2, 2] = float("inf")
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="1 has a weight that is not finite, first in row 2"):
        lk.quantize(model, always=True)
    assert type(model[0]) is nn.Linear and kept.keys() == model.state_dict().keys()
    for error, words, call in (
        (TypeError, "int", lambda: lk.quantize(3)),
        (TypeError, "Tensor", lambda: lk.quantize(model, inputs=torch.zeros(4))),
        (ValueError, "'int4'", lambda: lk.quantize(model, "int4")),
        (ValueError, "nan", lambda: lk.quantize(model, outlier_threshold=float("nan"))),
        (ValueError, "True", lambda: lk.quantize(model, rows=(True,))),
        (ValueError, r"\(0,\)", lambda: lk.quantize(model, rows=(0,))),
    ):
        with pytest.raises(error, match=words):
            call()


def test_files_of_shared_parts(tmp_path, speedups):
    pytest.importorskip("safetensors")

    class Own(nn.Module):
        def get_extra_state(self):
            return {}

    torch.manual_seed(0)
    shared, x = nn.Linear(8, 8), torch.randn(3, 8)
    stock = nn.Sequential(shared, nn.ReLU(), shared)
    stock.register_buffer("whole", torch.arange(9.0))
    stock.register_buffer("part", stock.whole[:4])
    model = copy.deepcopy(stock)
    lk.quantize(model)
    lk.save_quantized(model, tmp_path)
    lk.load_quantized(stock, tmp_path)
    assert torch.equal(stock(x), model(x)) and stock[0] is stock[2]
    model.append(Own())
    with pytest.raises(ValueError, match="_extra_state is no tensor but a dict"):
        lk.save_quantized(model, tmp_path)


def test_files(tmp_path, speedups):
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    stock, x = make_model(), torch.randn(2, 5, 32)
    model = copy.deepcopy(stock)
    with pytest.raises(ValueError, match="no int8 layers"):
        lk.save_quantized(model, tmp_path)
    lk.quantize(model, outlier_threshold=4.0)
    folder = tmp_path / "made" / "here"
    lk.save_quantized(model, folder)
    other = copy.deepcopy(stock)
    lk.load_quantized(other, folder)
    assert torch.equal(other(x), model(x))
    assert other.layers[0].linear1.outlier_threshold == 4.0

    with pytest.raises(ValueError, match=r"layers\.0\.self_attn is int8 already"):
        lk.load_quantized(other, folder)
    assert torch.equal(other(x), model(x))

    tensors, index = folder / "model.safetensors", folder / "llmos_quantization.json"
    good, described = load_file(tensors), json.loads(index.read_text())
    good = {k: v.clone() for k, v in good.items()}

    def refused(match, error=ValueError):
        fresh = copy.deepcopy(stock)
        with pytest.raises(error, match=match):
            lk.load_quantized(fresh, folder)
        assert (
            torch.equal(fresh(x), stock(x))
            and fresh.state_dict().keys() == stock.state_dict().keys()
        )
        save_file(good, tensors)
        index.write_text(json.dumps(described))

    name = "layers.1.linear1.weight_scale"
    save_file({k: v for k, v in good.items() if k != name}, tensors)
    refused(f"lacks: {name}")
    save_file(good | {"other": torch.zeros(1)}, tensors)
    refused("foreign tensors: other")
    save_file(good | {name: torch.zeros(3)}, tensors)
    refused(rf"{name} is torch.float32 \[3\], the model has torch.float32 \[64\]")
    save_file(good | {name: good[name].half()}, tensors)
    refused("torch.float16")
    tensors.write_bytes(tensors.read_bytes()[:100])
    refused("cannot be read")
    index.write_text("{")
    refused("cannot be read: JSONDecodeError")
    index.write_text(json.dumps(described | {"format": 9}))
    refused("format 9")
    entry = {"class": "Int8Linear", "mode": "dynamic", "outlier_threshold": 0.0}
    for modules, match in (
        ({"nowhere": entry}, "no module 'nowhere'"),
        ({"layers.0.norm1": entry}, "is a LayerNorm"),
        ({"layers.0.linear1": entry | {"mode": "x"}}, "unknown kind"),
        ({"layers.0.linear1": entry | {"class": []}}, "unknown kind"),
        ({"layers.0.linear1": entry | {"outlier_threshold": None}}, "unknown kind"),
        ({"layers.0.linear1": "Int8Linear"}, "unknown kind"),
        ([], "object"),
    ):
        index.write_text(json.dumps(described | {"modules": modules}))
        refused(match)
    with pytest.raises(ValueError, match="meta device"):
        lk.load_quantized(copy.deepcopy(stock).to("meta"), folder)
    tensors.unlink()
    refused("model.safetensors", FileNotFoundError)
