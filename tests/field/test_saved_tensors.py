"""Layers save for the backward what torch's save, and no more: frozen ones not their input.

After NVIDIA/TransformerEngine #739. So a step on a bias between forward and backward works, too.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import llmos_kernels as lk

D = 64
ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def saved_bytes(run, x, parameters):
    """Return how many bytes autograd holds after ``run(x)``, without the parameters."""
    of_parameters = {p.untyped_storage().data_ptr() for p in parameters}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in of_parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        run(x)
    return sum(found.values())


def leaves(flags, *shapes):
    pairs = zip(shapes, flags, strict=True)
    return [(torch.randn(shape) / 2).requires_grad_(flag) for shape, flag in pairs]


@pytest.mark.parametrize("flags", [f for f in itertools.product((False, True), repeat=3) if any(f)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear(activation, flags):
    x, w, b = leaves(flags, (32, D), (D, D), (D,))
    ours = saved_bytes(lambda x: lk.linear(x, w, b, activation), x, (w, b))
    assert ours <= saved_bytes(lambda x: ACTIVATIONS[activation](F.linear(x, w, b)), x, (w, b))


@pytest.mark.parametrize("flags", [f for f in itertools.product((False, True), repeat=3) if any(f)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_feed_forward(activation, flags):
    x, up, down = leaves(flags, (32, D), (2 * D, D), (D, 2 * D))

    def stock(x):
        return F.linear(ACTIVATIONS[activation](F.linear(x, up)), down)

    ours = saved_bytes(
        lambda x: lk.feed_forward(x, up, None, down, None, activation), x, (up, down)
    )
    assert ours <= saved_bytes(stock, x, (up, down))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8(activation):
    w, scale = lk.int8_quantize(torch.randn(D, D))
    x = torch.randn(32, D, requires_grad=True)
    ours = saved_bytes(lambda x: lk.int8_linear(x, w, scale, None, activation), x, (w, scale))
    assert ours <= (x.nbytes if activation else 0)


def by_linear(linear, x, up, b1, down, b2, activation):
    h = linear(x, up, b1) if activation is None else ACTIVATIONS[activation](linear(x, up, b1))
    return linear(h, down, b2)


OURS = {
    "linear": lambda x, up, b1, down, b2, a: lk.linear(lk.linear(x, up, b1, a), down, b2),
    "feed_forward": lk.feed_forward,
}


@pytest.mark.parametrize("flags", [(1, 1, 1), (1, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", OURS)
def test_a_bias_that_steps_before_the_backward(name, activation, flags):
    """First and second derivatives are those of the values of the forward, as in torch."""
    found = []
    for run in (OURS[name], lambda *args: by_linear(F.linear, *args)):
        torch.manual_seed(0)
        x, up, down = leaves(map(bool, flags), (5, 8), (12, 8), (8, 12))
        b1, b2 = torch.randn(12, requires_grad=True), torch.randn(8, requires_grad=True)
        y = run(x, up, b1, down, b2, activation)
        with torch.no_grad():
            b1.add_(1)
            b2.add_(1)
        inputs = [t for t in (x, up, b1, down, b2) if t.requires_grad]
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        wanted = [g.square().sum() for g in first if g.requires_grad]
        second = torch.autograd.grad(sum(wanted), inputs, materialize_grads=True)
        found.append([*first, *second])
    for ours, stock in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)
