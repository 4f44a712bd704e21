"""Modules that ``optimize`` does not swap, and the reasons that it reports."""

import pytest
import torch
from swap_models import (
    Block,
    DropsLast,
    DropsNothing,
    DropsSum,
    LooksAtShapes,
    Model,
    PreNorm,
    Scales,
    TwiceNorm,
)
from torch import nn

import llmos_kernels as lk
from llmos_kernels.swap import proof


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(4, 5, 16)


@pytest.mark.parametrize(
    "block", [PreNorm, DropsLast, DropsSum, DropsNothing, LooksAtShapes, Scales]
)
@pytest.mark.parametrize("proof", [True, False])
def test_another_formula_is_kept(x, block, proof):
    """Blocks with another formula are kept; most give the same numbers without dropout."""
    model = Model(block=block).eval()
    before = model(x)
    (kept,) = lk.optimize(model, verify=proof, always=True).kept
    assert kept.module == "block" and "is not LayerNorm(residual" in kept.reason
    torch.testing.assert_close(model(x), before)


def test_a_block_that_raises_is_kept():
    block = Block()

    class Raises(nn.Linear):
        def forward(self, input):
            assert input.dim() == 3

    block.project.__class__ = Raises
    kept = lk.optimize(block, always=True).entries[0]
    assert "could not be verified: AssertionError" in kept.reason


def test_a_wrong_kernel_is_kept(x, monkeypatch):
    model = Model().eval()
    right = lk.nn.LayerNorm.forward
    monkeypatch.setattr(lk.nn.LayerNorm, "forward", lambda self, x: right(self, x) * 1.001)
    report = lk.optimize(model, always=True)
    assert {e.module for e in report.kept} == {"first", "block.norm"}
    assert all(e.error > 1 and "error budget" in e.reason for e in report.kept)


@pytest.mark.parametrize("dropped", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_wrong_attention_is_kept(monkeypatch, dropped, hidden):
    """A wrong attention is found by generated and captured calls, also next to NaN from torch."""
    torch.manual_seed(0)
    right = lk.nn.MultiheadAttention.forward

    def wrong(self, query, key, value, **options):
        return right(self, query, key, value, **options | {dropped: None})

    monkeypatch.setattr(lk.nn.MultiheadAttention, "forward", wrong)
    module, x = nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(3, 24, 32)
    (kept,) = lk.optimize(module, always=True).kept
    assert kept.error > 1 and "error budget" in kept.reason
    padding = torch.zeros(3, 24, dtype=torch.bool)
    padding[1, 20:] = True
    padding[2] = hidden
    masks = {"key_padding_mask": padding, "attn_mask": torch.ones(24, 24).triu(1).bool()}
    inputs = {"query": x, "key": x, "value": x, **masks}
    assert lk.optimize(module, inputs=inputs, always=True).kept[0].error > 1


def test_a_draw_that_misses_is_judged_with_others():
    def draw(error, name="output"):
        exact = torch.ones(4, dtype=torch.float64)
        eager = torch.ones(4)
        return {name: (eager + error * torch.finfo(torch.float32).eps, exact, eager)}

    assert proof.largest_of(draw(0), iter(())) == 0
    assert proof.largest_of(draw(3), []) == 3
    assert proof.largest_of(draw(3), [draw(0), draw(1), draw(0)]) == 1
    for wrong in (None, {}, draw(0, "gradient"), draw(0) | draw(0, "gradient")):
        assert proof.largest_of(draw(3), [draw(0), wrong]) == float("inf")
    assert proof.largest_of(None, [draw(0)]) == float("inf")
    assert proof.largest_of(draw(float("inf")), [draw(0)] * 9) == float("inf")


def test_strict_raises_and_changes_nothing():
    model = nn.Sequential(nn.LayerNorm(8), TwiceNorm(8))
    with pytest.raises(ValueError, match="TwiceNorm"):
        lk.optimize(model, strict=True, always=True)
    assert type(model[0]) is nn.LayerNorm
    assert len(lk.optimize(model[:1], strict=True, always=True).swapped) == 1


def test_hooks_on_parts_of_a_block(x):
    model = Model().eval()
    seen = []
    handle = model.block.norm.register_forward_hook(lambda *a: seen.append(1))
    (kept,) = lk.optimize(model, always=True).kept
    assert "hooks" in kept.reason
    model(x)
    assert seen == [1]
    handle.remove()
    lk.restore(model)
    lk.optimize(model, always=True)
    model.block.norm.register_forward_hook(lambda *a: seen.append(2))
    model(x)
    assert seen == [1, 2]


def test_compiled_modules_are_kept(x):
    compiled = torch.compile(Model().eval(), backend="eager")
    in_place = Model().eval()
    in_place.block.compile(backend="eager")
    assert not lk.optimize(compiled, always=True).swapped
    assert {e.module for e in lk.optimize(in_place, always=True).kept} == {
        "block",
        "block.project",
        "block.norm",
    }
    swapped = Model().eval()
    expected = swapped(x)
    lk.optimize(swapped, always=True)
    torch.testing.assert_close(
        torch.compile(swapped, backend="aot_eager", fullgraph=True)(x), expected
    )


def test_odd_modules_are_kept():
    def reason(module, **options):
        entry = lk.optimize(module, **options).entries[0]
        assert not entry.swapped
        return entry.reason

    patched = nn.LayerNorm(8)
    patched.forward = lambda x: x
    assert "replaced on the instance" in reason(patched)
    parametrized = nn.LayerNorm(8)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    assert "subclass" in reason(parametrized)
    assert "meta" in reason(nn.LayerNorm(8, device="meta"))
    assert "run the model once" in reason(nn.LazyLinear(4))
    assert "float64" in reason(nn.LayerNorm(8, dtype=torch.float64))
    attention = nn.MultiheadAttention
    assert "above 256" in reason(attention(257, 1))
    assert "p=1.0" in reason(attention(16, 2, dropout=1.0))
    assert "subclass" in reason(torch.ao.nn.quantizable.MultiheadAttention(16, 2))
    parametrized = attention(16, 2)
    nn.utils.parametrize.register_parametrization(parametrized, "in_proj_weight", nn.Identity())
    assert "subclass" in reason(parametrized)
    assert "float64" in reason(attention(16, 2, dtype=torch.float64))
    blocks = nn.ModuleList([Block(p=1.0)])
    assert "p=1.0" in lk.optimize(blocks, always=True).kept[0].reason


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor"
)
def test_quantized_parts(x):
    model = Model().eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    before = quantized(x)
    report = lk.optimize(quantized, always=True)
    assert {e.module for e in report.swapped} == {"first", "last", "block.norm"}
    assert "verified" in report.kept[0].reason
    torch.testing.assert_close(quantized(x), before)
