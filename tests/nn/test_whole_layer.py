"""An encoder layer at inference is one op; where parts do more than compute, they are called."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import llmos_kernels as lk
from llmos_kernels.ops._encoder_layer import LayerMasks, may_fuse
from llmos_kernels.testing import DTYPES, OpRecorder, assert_within_budget

pytestmark = pytest.mark.usefixtures("our_forward")
D, HEADS, HIDDEN = 32, 4, 64


def layer(**options):
    """Return torch's layer and ours, in eval mode, with the same parameters."""
    options = {"batch_first": True, "activation": "gelu"} | options
    stock = nn.TransformerEncoderLayer(D, HEADS, HIDDEN, **options).eval()
    for p in stock.parameters():
        nn.init.normal_(p, std=0.3)
    ours = lk.nn.TransformerEncoderLayer(D, HEADS, HIDDEN, **options).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def is_whole(module, *args, **kwargs):
    """Return whether a call of ``module`` is the one op."""
    with OpRecorder() as record:
        module(*args, **kwargs)
    names = [op.name() for op, _ in record.calls]
    assert names == ["llmos::encoder_layer"] or "llmos::encoder_layer" not in names
    return "llmos::encoder_layer" in names


@pytest.fixture(autouse=True)
def slow_path():
    """Have torch's layers call their parts."""
    torch.manual_seed(0)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "as floats", "added"])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_matches_torch(dtype, norm_first, mask, bias):
    stock, ours = (m.to(dtype) for m in layer(norm_first=norm_first, bias=bias))
    exact = copy.deepcopy(stock).double()
    results = []
    for batch, length in ((2, 1), (3, 9), (1, 12), (2, 200)):
        x = torch.randn(batch, length, D).to(dtype)
        padding = torch.arange(length) >= torch.linspace(1, length, batch)[:, None]
        if mask == "as floats":
            padding = torch.zeros(padding.shape, dtype=dtype).masked_fill(padding, float("-inf"))
        if mask == "added":
            padding = torch.randn(batch, length).to(dtype)
        given = {"src_key_padding_mask": padding if mask else None}
        wide = {k: v.double() if mask in ("as floats", "added") else v for k, v in given.items()}
        assert is_whole(ours, x, **given)
        triple = ours(x, **given), exact(x.double(), **wide), stock(x, **given)
        results.append({"output": triple})
    assert_within_budget(results, "encoder layer")


@torch.no_grad()
def test_the_same_as_its_parts(monkeypatch):
    """Each step is rounded as its own op rounds."""
    for dtype in DTYPES:
        for norm_first in (False, True):
            _, ours = (m.to(dtype) for m in layer(norm_first=norm_first))
            x = torch.randn(3, 9, D).to(dtype)
            padding = torch.arange(9) >= torch.tensor([[9], [4], [0]])
            whole = ours(x, src_key_padding_mask=padding)
            with monkeypatch.context() as patch:
                patch.setattr(type(ours), "_whole", lambda *args: None)
                assert not is_whole(ours, x)
                parts = ours(x, src_key_padding_mask=padding)
            torch.testing.assert_close(whole, parts, rtol=3 * torch.finfo(dtype).eps, atol=1e-6)


def hooks(module):
    module.register_forward_hook(lambda *args: None)


def pre_hook(module):
    module.register_forward_pre_hook(lambda *args: None)


def forward(module):
    module.forward = module.forward


PARTS = ["self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", [hooks, pre_hook, forward], ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_part_that_does_more(part, change):
    _, ours = layer()
    x = torch.randn(2, 5, D)
    assert is_whole(ours, x)
    change(ours.get_submodule(part))
    assert not is_whole(ours, x)


class Other(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x):
        return super().forward(x) + 1


def parametrized(m):
    parametrize.register_parametrization(m.linear1, "weight", nn.Identity())


def trained(m):
    m.train()


def replaced(m):
    m.linear2 = Other(HIDDEN, D)


def without_norm(m):
    m.norm2 = nn.Identity()


def other_width(m):
    m.norm1 = nn.LayerNorm((5, D))


def int8(m):
    m.linear1 = lk.nn.Int8Linear.from_linear(m.linear1)


def other_activation(m):
    m.activation = torch.tanh


CHANGES = [parametrized, trained, replaced, without_norm, other_width, int8, other_activation]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_changed_layer(change):
    stock, ours = layer()
    x = torch.randn(2, 5, D)
    change(ours)
    assert not is_whole(ours, x)
    if change in (replaced, without_norm, other_width, other_activation, parametrized):
        change(stock)
        if change is replaced:
            stock.linear2.load_state_dict(ours.linear2.state_dict())
        torch.testing.assert_close(ours(x), stock(x))


def test_what_else_calls_the_parts():
    _, ours = layer()
    x = torch.randn(2, 5, D)
    assert not is_whole(ours, x), "gradients are recorded"
    with torch.no_grad():
        assert is_whole(ours, x)
        assert not is_whole(ours, x, torch.zeros(5, 5, dtype=torch.bool))
        assert not is_whole(ours, x.mT.contiguous().mT)
        assert not is_whole(ours, x[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_whole(ours, x)
        assert not is_whole(layer(batch_first=False)[1], x)
        assert not is_whole(layer()[1].double(), x.double())
    with torch.inference_mode():
        assert is_whole(ours, x)
    for p in ours.parameters():
        p.requires_grad_(False)
    assert is_whole(ours, x)
    assert not is_whole(ours, x.requires_grad_())


@torch.no_grad()
def test_a_subclass_calls_the_parts():
    class Sub(lk.nn.TransformerEncoderLayer):
        def _feed_forward(self, x):
            return super()._feed_forward(x) + 1

    module = Sub(D, HEADS, HIDDEN, batch_first=True).eval()
    assert not is_whole(module, torch.randn(2, 5, D))


@torch.no_grad()
def test_parameters_are_read_at_each_call():
    stock, ours = layer()
    x = torch.randn(2, 5, D)
    ours(x)
    for module in (stock, ours):
        module.linear1.weight.data.mul_(2)
        module.norm2.bias.add_(1)
        module.self_attn.in_proj_weight = nn.Parameter(module.self_attn.in_proj_weight / 2)
    torch.testing.assert_close(ours(x), stock(x))


@torch.no_grad()
def test_traces_have_the_parts():
    _, ours = layer()
    x = torch.randn(2, 5, D)
    exported = torch.export.export(ours, (x,))
    assert "encoder_layer" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x), ours(x))

    def asks(x):
        return x + int(may_fuse(x, LayerMasks(), ours.linear1.weight))

    assert torch.equal(torch.jit.trace(asks, x, check_trace=False)(x), x)
    assert torch.equal(asks(x), x + 1)


@torch.no_grad()
def test_errors_are_those_of_the_parts():
    _, ours = layer()
    with pytest.raises(AssertionError, match="embedding dimension of 32"):
        ours(torch.randn(2, 5, D + 1))
    with pytest.raises(AssertionError, match="key_padding_mask"):
        ours(torch.randn(2, 5, D), src_key_padding_mask=torch.zeros(2, 6, dtype=torch.bool))


@pytest.mark.parametrize("training", [False, True])
def test_a_part_of_another_class_is_called(training):
    """It has no weight of its own."""
    stock, ours = (m.train(training) for m in layer(dropout=0.0))
    for m in (stock, ours):
        m.linear1 = nn.Sequential(m.linear1)
    x = torch.randn(2, 9, D)
    torch.testing.assert_close(ours(x), stock(x))
    with torch.no_grad():
        assert not is_whole(ours, x)


@torch.no_grad()
def test_padding_of_integers_is_refused():
    for m in layer():
        with pytest.raises((AssertionError, RuntimeError, TypeError, ValueError)):
            m(torch.randn(2, 9, D), src_key_padding_mask=torch.zeros(2, 9, dtype=torch.int64))
