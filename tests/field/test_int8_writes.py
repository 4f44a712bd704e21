"""A write to the float weight of an int8 layer, which is not stored, is not lost in silence.

Assigning quantizes; a write in place raises; PEFT merges by assignment, ``safe_merge=True``.
"""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import llmos_kernels as lk
from llmos_kernels.nn import Int8Linear


def layer() -> Int8Linear:
    """Return an int8 layer of 40 inputs and 24 outputs."""
    torch.manual_seed(0)
    return Int8Linear.from_linear(nn.Linear(40, 24))


@pytest.mark.parametrize("assign", ["weight", "data"])
@pytest.mark.parametrize("inference", [False, True])
def test_assigning_quantizes(assign, inference):
    ours, value, x = layer(), torch.randn(24, 40), torch.randn(7, 40)
    ours(x)  # So that there is a copy in VNNI layout.
    with torch.inference_mode(inference):
        if assign == "weight":
            ours.weight = value
        else:
            ours.weight.data = value
    float_layer = nn.Linear(40, 24)
    with torch.no_grad():
        float_layer.weight.copy_(value)
        float_layer.bias.copy_(ours.bias)
    expected = Int8Linear.from_linear(float_layer)
    assert torch.equal(ours.weight, expected.weight)
    assert torch.equal(ours(x), expected(x))


def test_arithmetic_and_assignment():
    ours, delta = layer(), torch.randn(24, 40)
    before = ours.weight.clone()
    ours.weight = ours.weight + delta
    assert (ours.weight - before - delta).abs().max() < 0.02


WRITES = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(24, 40)),
    "augmented": lambda w: w.__iadd__(1),
    "item": lambda w: w.__setitem__((0, 0), 1.0),
    "of data": lambda w: w.data.mul_(2),
    "of detach": lambda w: w.detach().zero_(),
    "of a row": lambda w: w[3].fill_(1),
    "of a transposed view": lambda w: w.T.add_(1),
    "of a part of split": lambda w: w.split(8)[1].zero_(),
    "out=": lambda w: torch.add(w, 1, out=w),
    "nn.init": nn.init.xavier_uniform_,
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_write_in_place_raises(write, inference):
    ours, x = layer(), torch.randn(7, 40)
    y = ours(x)
    with (
        torch.inference_mode(inference),
        torch.no_grad(),
        pytest.raises(RuntimeError, match="writes in place to the float weight of an int8 layer"),
    ):
        WRITES[write](ours.weight)
    assert torch.equal(ours(x), y)


def test_wrong_values_change_nothing():
    ours, x = layer(), torch.randn(7, 40)
    y = ours(x)
    for value, error in (
        (torch.zeros(3, 40), ValueError),
        (torch.full((24, 40), float("nan")), ValueError),
        (None, TypeError),
    ):
        with pytest.raises(error):
            ours.weight = value
        with pytest.raises(error):
            ours.weight.data = value
    assert torch.equal(ours(x), y)


def test_reading():
    """The weight is read like any tensor, and copies of it are plain."""
    ours = layer()
    weight, plain = ours.weight, torch.Tensor
    assert type(weight.clone()) is type(weight + 1) is type(weight.to(torch.float64)) is plain
    assert type(copy.deepcopy(weight)) is type(pickle.loads(pickle.dumps(weight))) is plain
    assert torch.equal(copy.deepcopy(weight), weight)
    assert torch.equal(pickle.loads(pickle.dumps(weight[2])), weight[2])
    weight.clone().add_(1)
    (weight + 1).zero_()
    x = torch.randn(3, 40, requires_grad=True)
    torch.nn.functional.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 40))


def test_attention():
    """The weights of int8 attention are those of its int8 layers."""
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    lk.quantize(attention, always=True)
    with pytest.raises(RuntimeError, match="int8 layer"):
        attention.in_proj_weight.add_(1)
    with pytest.raises(RuntimeError, match="int8 layer"):
        nn.init.zeros_(attention.out_proj.weight)
    attention.in_proj_weight.data = torch.zeros(96, 32)
    assert not attention.in_proj.weight_int8.any()


def test_compiled():
    """A graph reads the weight, as a plain tensor."""
    ours = layer()
    read = torch.compile(lambda: ours.weight * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(read(), ours.weight * 2)


@pytest.fixture
def adapted():
    """Return a quantized model with LoRA adapters, and what it computes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    lk.quantize(model, always=True)
    config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    model, x = get_peft_model(model, config), torch.randn(9, 64)
    return model, x, model(x).detach()


def test_peft_merges(adapted):
    model, x, y = adapted
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged[0]) is Int8Linear
    assert (merged(x) - y).norm() < 0.02 * y.norm()


def test_peft_is_told(adapted):
    """Without ``safe_merge`` PEFT adds in place."""
    model, x, y = adapted
    with pytest.raises(RuntimeError, match="safe_merge=True"):
        model.merge_and_unload()
    assert torch.equal(model(x), y)
