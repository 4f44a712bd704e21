"""Every module runs on the meta device and with fake tensors, masks and padding included."""

import copy

import pytest
import torch
from swap_models import Block, classes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llmos_kernels as lk

D, LENGTH = 16, 7


def encoder():
    layer = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def padding(x):
    return torch.zeros(x.shape[0], LENGTH, dtype=torch.bool, device=x.device)


CALLS = {
    "encoder": (encoder, lambda m, x: m(x)),
    "encoder, padding": (encoder, lambda m, x: m(x, src_key_padding_mask=padding(x))),
    "layer, mask": (
        lambda: nn.TransformerEncoderLayer(D, 2, 32, batch_first=True),
        lambda m, x: m(x, src_mask=torch.zeros(LENGTH, LENGTH, device=x.device)),
    ),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(D, 2, 32, batch_first=True),
        lambda m, x: m(x, x, tgt_key_padding_mask=padding(x), memory_key_padding_mask=padding(x)),
    ),
    "attention": (
        lambda: nn.MultiheadAttention(D, 2, batch_first=True),
        lambda m, x: m(x, x, x, key_padding_mask=padding(x).float())[0],
    ),
    "linear": (lambda: nn.Linear(D, D), lambda m, x: m(x)),
    "layer_norm": (lambda: nn.LayerNorm(D), lambda m, x: m(x)),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)),
        lambda m, x: m(x),
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_shapes(name, quantize, training):
    make, call = CALLS[name]
    model = make()
    lk.optimize(model, verify=False)
    if quantize:
        lk.quantize(model, always=True)
    model.train(training)
    expected = call(model, torch.randn(2, LENGTH, D)).shape
    on_meta = copy.deepcopy(model).to("meta")
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert call(on_meta, torch.empty(2, LENGTH, D, device="meta")).shape == expected
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            with mode:
                made = call(model, mode.from_tensor(torch.randn(2, LENGTH, D)))
            assert made.shape == expected


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), 1e-6

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class ReadsData(TorchDispatchMode):
    """Refuses to read or copy the data of a meta tensor, which has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        meta = any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves((args, kwargs)))
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if meta and not (results and all(t.is_meta for t in results)):
            reads_nothing = func is torch.ops.aten.empty_like.default
            assert reads_nothing or not tree_leaves(out), func
        return out


STOCK = {
    "encoder": encoder,
    "decoder": lambda: nn.TransformerDecoderLayer(D, 2, 32, batch_first=True),
    "attention": lambda: nn.MultiheadAttention(D, 2),
    "linear": lambda: nn.Linear(D, D),
    "layer_norm": lambda: nn.LayerNorm(D),
    "own norm": Norm,
    "residual": Block,
    "sequential": lambda: nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)),
}


@pytest.mark.parametrize("name", STOCK)
def test_modules_on_meta_are_kept(name):
    """They are looked at without their data, as a model before its checkpoint is loaded."""
    with torch.device("meta"):
        model = STOCK[name]()
    before = classes(model)
    with ReadsData():
        for verify in (False, True):
            report = lk.optimize(model, verify)
            assert all(e.reason.endswith("is on the meta device") for e in report.entries)
            assert report.entries or name == "linear"  # Which is looked at on CPUs only.
            repr(model), str(report), report.details()
    assert classes(model) == before


@pytest.mark.parametrize("name", STOCK)
def test_swapped_modules_move_to_meta_and_back(name):
    model = STOCK[name]()
    lk.optimize(model, verify=False)
    swapped, state = classes(model), {k: t.clone() for k, t in model.state_dict().items()}
    with ReadsData():
        on_meta = copy.deepcopy(model).to("meta")
        assert not lk.optimize(on_meta).entries
        repr(on_meta), copy.deepcopy(on_meta), on_meta.state_dict(), on_meta.train().eval()
    on_meta.load_state_dict(state, assign=True)
    assert classes(on_meta) == swapped
    again = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    again.load_state_dict(state)
    lk.restore(on_meta)
    for loaded in (on_meta, again):
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, state[key])


@pytest.mark.parametrize("name", STOCK)
def test_built_on_the_default_device_meta(name):
    """A model on the CPU is looked at alike inside of ``torch.device("meta")``."""
    model = STOCK[name]()
    with torch.device("meta"):
        report = lk.optimize(model, verify=False)
    assert report.swapped and not report.kept
