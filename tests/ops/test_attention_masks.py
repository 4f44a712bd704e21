"""Attention masks: hidden keys, layouts, gradients, and extreme logits."""

import itertools

import pytest
import torch
from attention_checks import check, explicit, make, outputs_and_gradients

from llmos_kernels import scaled_dot_product_attention as attention
from llmos_kernels.testing import DTYPES, assert_accurate

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def hidden_rows(device):
    """Yield options of attention, and which [batch, head, query] see no key with them."""
    mask = torch.ones(2, 1, 9, 20, dtype=torch.bool, device=device)
    mask[:, :, 4] = False
    none = torch.zeros(2, 4, 9, dtype=torch.bool, device=device)
    row, batch = none.clone(), none.clone()
    row[:, :, 4], batch[1] = True, True
    ignored = torch.zeros(2, 20, dtype=torch.bool, device=device)
    ignored[1] = True
    float_mask = torch.zeros(2, 1, 9, 20, device=device).masked_fill(~mask, float("-inf"))
    yield {"attn_mask": mask}, row
    yield {"attn_mask": float_mask}, row
    yield {"key_padding_mask": ignored}, batch
    left = ignored.clone()
    left[0, :3] = True
    first = batch.clone()
    first[0, :, :3] = True
    yield {"key_padding_mask": left, "is_causal": True}, first


@each_dtype
def test_rows_that_see_nothing(dtype, device):
    for options, hidden in hidden_rows(device):
        args = [t.requires_grad_() for t in make(9, 20, dtype, device=device)]
        out, weights = attention(*args, **options, return_weights="per_head")
        assert out.isfinite().all() and not out[hidden].any() and not weights[hidden].any()
        assert out[~hidden].abs().sum(-1).min() > 0
        plain = attention(*args, **options)
        assert torch.equal(plain, out)
        grads = torch.autograd.grad(plain.sum() + (plain * 3).sum(), args)
        assert all(g.isfinite().all() for g in grads) and not grads[0][hidden].any()
    q, k, v = make(9, 4, dtype, device=device)
    out = attention(q, k, v, is_causal=True, bottom_right=True)
    assert not out[:, :, :5].any() and out[:, :, 5:].any(-1).all()
    out = attention(q, k[:, :, :0], v[:, :, :0])
    assert out.shape == q.shape and not out.any()


@each_dtype
def test_nothing_of_ignored_keys_leaks(dtype, device):
    q, k, v = make(33, 200, dtype, device=device)
    ignored = torch.zeros(2, 200, dtype=torch.bool, device=device)
    ignored[0, 150:], ignored[1, 7::5] = True, True
    mask = torch.randn(1, 4, 33, 200, device=device)
    clean = outputs_and_gradients(attention, [q, k, v, mask], key_padding_mask=ignored)
    for t, value in ((k, float("nan")), (v, float("inf"))):
        t.masked_fill_(ignored[:, None, :, None], value)
    dirty = outputs_and_gradients(attention, [q, k, v, mask], key_padding_mask=ignored)
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a, b)
    hidden = ignored[:, None, :, None].expand(k.shape)
    assert not dirty[2][hidden].any() and not dirty[3][hidden].any()


@each_dtype
@pytest.mark.parametrize("shift", [0.0, -1000.0, 1e4])
@pytest.mark.parametrize("spread", [0.0, 1.0, 60.0])
def test_extreme_logits(spread, shift, dtype, device):
    """Results stay accurate for equal logits, logits near +-1e4 and log-sum-exps below -88."""
    q, k, v = make(65, 130, dtype, device=device)
    q = q * spread
    bias = torch.full((1, 1, 65, 130), shift, device=device)
    actual = outputs_and_gradients(attention, [q, k, v, bias])
    assert all(a.isfinite().all() for a in actual)
    right = outputs_and_gradients(explicit, [q, k, v, bias], torch.float64)
    eager = outputs_and_gradients(explicit, [q, k, v, bias.to(dtype)])
    assert_accurate(actual[0], right[0], eager[0], "out")
    assert_accurate(actual[3], right[3], eager[3], "dvalue")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("gap", [80.0, 87.0, 95.0, 300.0, 1e9, 3e38])
def test_weights_below_the_range_of_floats(gap, with_bias, device):
    """A key `gap` below the other weighs e^-gap, or less than any normal float, and NaN stays."""
    query, key = torch.ones(1, 1, 3, 1, device=device), torch.zeros(1, 1, 2, 1, device=device)
    value = torch.tensor([[0.0], [1.0]], device=device).expand(1, 1, 2, 1)
    bias = torch.tensor([0.0, -gap], device=device).expand(3, 2) if with_bias else None
    if not with_bias:
        key[0, 0, 1] = -gap
    query[0, 0, 1] = float("nan")
    out = attention(query, key, value, bias, scale=1.0).flatten()
    assert out[1].isnan()
    weights, right = out[::2], torch.full((2,), -gap, dtype=torch.float64, device=device).exp()
    smallest = torch.finfo(torch.float32).tiny
    if right[0] < smallest:
        assert (weights >= 0).all() and (weights < smallest).all()
    else:
        assert_accurate(weights, right, torch.full_like(weights, -gap).exp(), "weights")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_the_lowest_float(dtype, device):
    """A row masked by finfo.min everywhere attends to all keys alike, as in torch."""
    q, k, v = make(5, 70, dtype, device=device)
    mask = torch.zeros(5, 70, dtype=dtype, device=device)
    mask[2], mask[3, 10:] = torch.finfo(dtype).min, torch.finfo(dtype).min
    out = attention(q, k, v, mask)
    torch.testing.assert_close(out[:, :, 2], v.float().mean(2).to(dtype), atol=1e-2, rtol=1e-2)
    alone = attention(q[:, :, 3:4], k[:, :, :10], v[:, :, :10])
    torch.testing.assert_close(out[:, :, 3:4], alone, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
def test_mask_layouts(dtype, device):
    """Masks of any strides and dtype give the same bits."""
    q, k, v = make(67, 150, device=device)
    mask = torch.randn(2, 4, 67, 150, device=device)
    mask = mask > -1 if dtype == torch.bool else mask.to(dtype)
    expected = attention(q, k, v, mask)
    for layout in (
        lambda m: m.mT.contiguous().mT,
        lambda m: m.repeat_interleave(3, -1)[..., ::3],
        lambda m: m.transpose(0, 2).contiguous().transpose(0, 2),
        lambda m: m.flip(0).contiguous().flip(0),
    ):
        assert torch.equal(attention(q, k, v, layout(mask)), expected)
    for small in (mask[:1, :1], mask[..., :1], mask[:, :, :1], mask[0], mask[0, 0]):
        whole = small.expand(2, 4, 67, 150)
        expected = attention(q, k, v, whole.clone())
        assert torch.equal(attention(q, k, v, small), expected)
        assert torch.equal(attention(q, k, v, whole), expected)


@pytest.mark.parametrize("full", list(itertools.product([0, 1], repeat=4)), ids=str)
@each_dtype
def test_mask_gradient(full, dtype, device):
    """The gradient of a mask is summed over the dimensions that it is broadcast over."""
    sizes = (2, 4, 67, 150)
    shape = [n if f else 1 for n, f in zip(sizes, full, strict=True)]
    q, k, v = make(67, 150, dtype, device=device)
    mask = torch.randn(shape, device=device).to(dtype)
    if full[3]:
        check([q, k, v, mask])
    else:  # A mask that is equal for all keys has no effect: its gradient is 0 but for rounding.
        *_, dmask = outputs_and_gradients(attention, [q, k, v, mask])
        per_key = outputs_and_gradients(attention, [q, k, v, mask.expand(*shape[:3], 150)])[-1]
        assert dmask.shape == mask.shape
        assert dmask.abs().max() <= 0.02 * per_key.abs().sum(-1).max()


@pytest.mark.quick
@pytest.mark.parametrize("kv_heads", (4, 2))
@pytest.mark.parametrize("mask", ((1, 1, 70, 150), (3, 1, 70, 150), (1, 4, 1, 150), (3, 4, 70, 1)))
def test_mask_gradient_of_any_threads(mask, kv_heads):
    """With how many threads the gradient of a mask is computed together with the others, and with
    how many apart, makes no difference."""
    torch.manual_seed(0)
    q, k, v, bias = (
        torch.randn(shape, requires_grad=True)
        for shape in ((3, 4, 70, 24), (3, kv_heads, 150, 24), (3, kv_heads, 150, 24), mask)
    )
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            out = attention(q, k, v, bias, enable_gqa=True)
            found.append(torch.autograd.grad(out.square().sum(), (q, k, v, bias)))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert torch.equal(a, b)
