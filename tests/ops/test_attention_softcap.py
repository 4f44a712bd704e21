"""Attention with a softcap and with sinks, beyond the tests of every op."""

import functools

import pytest
import torch
from attention_checks import compare, make, outputs_and_gradients, worse

from llmos_kernels import scaled_dot_product_attention as attention
from llmos_kernels.testing import DTYPES, assert_accurate

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def explicit(q, k, v, sinks=None, bias=None, *, softcap=None, visible=None):
    """Return attention by matrix products and softmax; every query sees a key."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], -1)
    return logits.softmax(-1)[..., : k.shape[2]] @ v


def ours(q, k, v, sinks=None, bias=None, **options):
    """Return our attention, which takes the tensors in another order."""
    return attention(q, k, v, bias, sinks=sinks, enable_gqa=True, **options)


def results(args, softcap, visible, **options):
    """Return our outputs and gradients, those in float64, and the worse of torch's two."""
    plain = functools.partial(explicit, softcap=softcap, visible=visible)
    exact = outputs_and_gradients(plain, args, torch.float64)
    wide = [t if t is None else t.float() for t in args]
    eagers = outputs_and_gradients(plain, args), outputs_and_gradients(plain, wide)
    rounded = [t.to(e.dtype) for t, e in zip(eagers[1], eagers[0], strict=True)]
    actual = outputs_and_gradients(ours, args, softcap=softcap, **options)
    return actual, exact, worse(exact, eagers[0], rounded)


@each_dtype
@pytest.mark.parametrize("softcap, sunk", [(1.5, False), (None, True), (0.8, True)])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_with_every_mask(mask, softcap, sunk, dtype, device):
    def one_size(q_len, k_len):
        q, k, v = make(q_len, k_len, dtype, kv_heads=2, device=device)
        sinks = torch.randn(4, device=device).to(dtype) if sunk else None
        ignored = torch.rand(2, k_len, device=device) < 0.3
        ignored[:, 0] = False
        visible = torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril()
        visible = visible & ~ignored[:, None, None]
        options = {"is_causal": True, "key_padding_mask": ignored}
        if mask == "float":
            bias = torch.randn(4, q_len, k_len, device=device).to(dtype)
            return results([q, k, v, sinks, bias], softcap, visible, **options)
        if mask is None:
            return results([q, k, v, sinks], softcap, visible, **options)
        seen = torch.rand(2, 1, q_len, k_len, device=device) < 0.6
        seen[..., 0] = True
        actual = outputs_and_gradients(
            functools.partial(ours, bias=seen, softcap=softcap, **options), [q, k, v, sinks]
        )
        return actual, *results([q, k, v, sinks], softcap, visible & seen)[1:]

    torch.manual_seed(0)
    compare(*(one_size(*size) for size in ((1, 65), (63, 64), (130, 129))))


@each_dtype
@pytest.mark.parametrize("q_len", [1, 4, 17])
def test_decode(q_len, dtype, device):
    """A few queries attend to many keys; a row's bits do not depend on its batch."""
    torch.manual_seed(0)
    q, k, v = make(q_len, 2500, dtype, batch=3, heads=8, kv_heads=2, dim=48, device=device)
    sinks = torch.randn(8, device=device).to(dtype) + 3
    options = {"is_causal": True, "bottom_right": True}
    visible = torch.ones(q_len, 2500, dtype=torch.bool, device=device).tril(2500 - q_len)
    found = results([q, k, v, sinks], 2.0, visible, **options)
    compare(found)
    for b in range(3):
        alone = ours(q[b : b + 1], k[b : b + 1], v[b : b + 1], sinks, softcap=2.0, **options)
        assert torch.equal(alone[0], found[0][0][b])


@each_dtype
@pytest.mark.parametrize("q_len, k_len", [(9, 20), (2, 1500)])
def test_rows_that_see_nothing(q_len, k_len, dtype, device):
    """Such a row stays 0, and its sink gets no gradient."""
    args = make(q_len, k_len, dtype, device=device)
    sinks = torch.randn(4, device=device).to(dtype)
    hidden = torch.ones(2, k_len, dtype=torch.bool, device=device)
    leaves = [t.requires_grad_() for t in (*args, sinks)]
    options = {"key_padding_mask": hidden, "softcap": 5.0, "sinks": sinks}
    out, weights = attention(*args, **options, return_weights="per_head")
    out = out + attention(*args, **options)
    assert not out.any() and not weights.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), leaves))
    hidden[1, 3] = False
    out = attention(*args, **options)
    assert not out[0].any() and out[1].any()
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert all(g.isfinite().all() for g in gradients) and gradients[3].all()
    assert not any(g[0].any() for g in gradients[:3])


@each_dtype
def test_sinks_of_any_size(dtype, device):
    torch.manual_seed(0)
    q, k, v = make(33, 200, dtype, device=device)
    none = torch.full((4,), float("-inf"), device=device)
    assert torch.equal(ours(q, k, v, none), ours(q, k, v))
    low = torch.full((4,), -1e4, device=device)
    assert torch.equal(ours(q, k, v, low), ours(q, k, v))
    high = torch.full((4,), 1e4, device=device)
    assert not ours(q, k, v, high).any()
    compare(results([q, k, v, torch.tensor([-1e4, -3.0, 2.0, 20.0], device=device)], None, None))
    # Both are high: only their difference matters.
    bias = torch.full((1, 1, 33, 200), 1e4, device=device)
    zero = torch.zeros(4, device=device)
    shifted = ours(q, k, v, high, bias)
    torch.testing.assert_close(shifted, ours(q, k, v, zero), rtol=0.02, atol=0.02)


@each_dtype
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_softcap_of_scores_of_any_size(spread, dtype, device):
    """Of small scores the cap keeps every digit, large ones it makes finite."""
    torch.manual_seed(0)
    q, k, v = make(33, 200, dtype, device=device)
    compare(results([q * spread, k, v], 30.0, None))
    compare(results([q * spread, k, v], 0.01, None))


@pytest.mark.parametrize("kind", ["mean", "per_head"])
@each_dtype
def test_weights(kind, dtype, device):
    """The weights are what is left beside the sink."""
    torch.manual_seed(0)
    q, k, v = make(67, 150, dtype, device=device)
    options = {"return_weights": kind, "softcap": 2.0, "is_causal": True}
    sinks = torch.full((4,), 2.0, device=device)
    out, weights = attention(q, k, v, sinks=sinks, **options)
    wide = (t.double() for t in (q, k, v))
    exact = attention(*wide, sinks=sinks.double(), **options)
    eager = attention(q, k, v, sinks=sinks, **options, backend="reference")
    assert_accurate(weights, exact[1], eager[1], "weights")
    assert weights.sum(-1).max() < 0.99
    assert torch.equal(out, attention(q, k, v, sinks=sinks, **options | {"return_weights": None}))


def test_gradient_of_the_weights(device):
    torch.manual_seed(0)
    args = [*make(9, 20, device=device), torch.randn(4, device=device)]

    def gradients(dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in args]
        torch.manual_seed(0)
        out, weights = attention(
            *leaves[:3], None, 0.3, sinks=leaves[3], softcap=2.0, return_weights="mean"
        )
        loss = out.square().sum() + (weights * weights.detach().cos()).sum()
        return torch.autograd.grad(loss, leaves)

    for a, exact in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        torch.testing.assert_close(a, exact.float(), rtol=1e-4, atol=1e-5)


def test_bad_calls(device):
    q, k, v = make(9, 20, device=device)
    for softcap in (0.0, -2.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"softcap must be .* got {softcap}"):
            attention(q, k, v, softcap=softcap)
    for sinks in (torch.ones(3), torch.ones(4, 1), torch.ones(())):
        with pytest.raises(ValueError, match=r"sinks must be \[heads\] = \[4\], got"):
            attention(q, k, v, sinks=sinks.to(device))
    for dtype in (torch.int64, torch.float64, torch.bool):
        with pytest.raises(TypeError, match=f"sinks must be .* got {dtype}"):
            attention(q, k, v, sinks=torch.ones(4, dtype=dtype, device=device))
    with pytest.raises(ValueError, match="sinks is on meta"):
        attention(q, k, v, sinks=torch.ones(4, device="meta"))
