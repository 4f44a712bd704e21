"""What attention has to do beyond the tests of every op: torch's semantics, extreme rows, splits."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmos_kernels import scaled_dot_product_attention as attention
from llmos_kernels.ops.dropout import draw_seed, keep_mask
from llmos_kernels.testing import DTYPES, assert_accurate

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = ((1, 1), (1, 65), (63, 64), (64, 193), (130, 129))


def make(q_len, k_len, dtype=torch.float32, batch=2, heads=4, kv_heads=4, dim=24, device="cpu"):
    generator = torch.Generator().manual_seed(q_len * 1000 + k_len)
    return [
        torch.randn(batch, length, n, dim, generator=generator).to(device, dtype).transpose(1, 2)
        for length, n in ((q_len, heads), (k_len, kv_heads), (k_len, kv_heads))
    ]


def explicit(q, k, v, mask=None, enable_gqa=False):
    """What is written without any fused op; rows that see nothing are 0."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        logits = logits + mask
    return logits.softmax(-1).nan_to_num(0.0) @ v


def outputs_and_gradients(fn, args, dtype=None, **options):
    """The output and the gradients of the float arguments, in ``dtype`` throughout."""
    args = [
        a.detach().to(dtype or a.dtype, copy=True).requires_grad_()
        if a is not None and a.is_floating_point()
        else a
        for a in args
    ]
    out = fn(*args, **options)
    generator = torch.Generator().manual_seed(7)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    leaves = [a for a in args if a is not None and a.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.device, out.dtype))]


def compare(*results):
    """Each result of one call or several: (ours, in float64, torch's); the largest errors count."""
    for i, columns in enumerate(zip(*(zip(*r, strict=True) for r in results), strict=True)):
        a, exact, e = (torch.cat([t.flatten() for t in ts]) for ts in zip(*columns, strict=True))
        if exact.abs().max() < 1e-12:  # One visible key: the gradient is 0, and rounding errors.
            assert a.abs().max() <= 64 * torch.finfo(a.dtype).eps
        else:
            assert_accurate(a, exact, e, f"result {i}")


def worse(exact, *eagers):
    """Of torch's two ways to compute each result, the one with the larger error."""
    return [
        max(ways, key=lambda t, e=e: (t - e).abs().max())
        for e, *ways in zip(exact, *eagers, strict=True)
    ]


def math(*args, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **options)


def results(args, mask=None, exact=explicit, **options):
    """Ours with ``options``, ``exact`` in float64 and torch's, both with the merged mask."""
    gqa = {"enable_gqa": True} if options.get("enable_gqa") else {}
    actual = outputs_and_gradients(attention, args, **options)
    merged = args if mask is None else [*args[:3], mask]
    right = outputs_and_gradients(exact, merged, torch.float64, **gqa)
    eagers = (outputs_and_gradients(fn, merged, **gqa) for fn in (explicit, exact))
    return actual, right, worse(right, *eagers)


def check(args, mask=None, exact=explicit, **options):
    found = results(args, mask, exact, **options)
    compare(found)
    return found[0]


@each_dtype
@pytest.mark.parametrize("gqa", [False, True], ids=["", "gqa"])
@pytest.mark.parametrize("padding", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_is_torchs_math(mask, causal, padding, gqa, dtype, device):
    """Every combination against torch's math kernel in float64, outputs and gradients."""

    def one_size(q_len, k_len):
        q, k, v = make(q_len, k_len, dtype, kv_heads=2 if gqa else 4, device=device)
        visible = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
        visible = visible.tril() if causal else visible
        options = {"is_causal": causal, "enable_gqa": gqa}
        if padding:
            ignored = torch.rand(2, k_len, device=device) < 0.3
            ignored[:, 0] = False
            options["key_padding_mask"] = ignored
            visible = visible & ~ignored[:, None, None]
        args = [q, k, v]
        if mask == "bool":
            args.append(torch.rand(2, 1, q_len, k_len, device=device) < 0.6)
            args[3][..., 0] = True
            visible = visible & args[3]
        if mask != "float":
            return results(args, visible, math, **options)
        args.append(torch.randn(4, q_len, k_len, device=device).to(dtype))

        def masked(fn):
            def call(q, k, v, bias):
                return fn(q, k, v, bias.masked_fill(~visible, float("-inf")), enable_gqa=gqa)

            return call

        exact = outputs_and_gradients(masked(math), args, torch.float64)
        eagers = (outputs_and_gradients(masked(fn), args) for fn in (math, explicit))
        return outputs_and_gradients(attention, args, **options), exact, worse(exact, *eagers)

    compare(*(one_size(*size) for size in SIZES))


@each_dtype
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 160, 191, 193, 1000])
def test_lengths(length, dtype, device):
    q, k, v = make(length, length, dtype, batch=1, heads=2, kv_heads=2, device=device)
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    check([q, k, v], visible, is_causal=True)
    ignored = torch.zeros(1, length, dtype=torch.bool, device=device)
    ignored[:, : length // 3] = True
    check([q, k, v], ~ignored[:, None, None], key_padding_mask=ignored)


@each_dtype
@pytest.mark.parametrize(
    "dims", [(1, 2, 3, 7), (15, 17, 31, 33), (48, 65, 96, 127), (129, 200, 255, 256)], ids=str
)
def test_head_dims(dims, dtype, device):
    def one_size(dim, v_dim):
        q, k, _ = make(9, 21, dtype, dim=dim, device=device)
        return results([q, k, make(9, 21, dtype, dim=v_dim, device=device)[2]])

    compare(*(one_size(dim, v_dim) for dim in dims for v_dim in (dim, 257 - dim)))


def hidden_rows(device):
    """(options, rows that see no key)"""
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
    """All equal, near +-1e4 and with a log-sum-exp far below -88."""
    q, k, v = make(65, 130, dtype, device=device)
    q = q * spread
    bias = torch.full((1, 1, 65, 130), shift, device=device)
    actual = outputs_and_gradients(attention, [q, k, v, bias])
    assert all(a.isfinite().all() for a in actual)
    right = outputs_and_gradients(explicit, [q, k, v, bias], torch.float64)
    eager = outputs_and_gradients(explicit, [q, k, v, bias.to(dtype)])
    assert_accurate(actual[0], right[0], eager[0], "out")
    assert_accurate(actual[3], right[3], eager[3], "dvalue")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_the_lowest_float(dtype, device):
    """Where a mask of finfo.min hides all of a row, it hides nothing: torch attends to all alike."""
    q, k, v = make(5, 70, dtype, device=device)
    mask = torch.zeros(5, 70, dtype=dtype, device=device)
    mask[2], mask[3, 10:] = torch.finfo(dtype).min, torch.finfo(dtype).min
    out = attention(q, k, v, mask)
    torch.testing.assert_close(out[:, :, 2], v.float().mean(2).to(dtype), atol=1e-2, rtol=1e-2)
    alone = attention(q[:, :, 3:4], k[:, :, :10], v[:, :, :10])
    torch.testing.assert_close(out[:, :, 3:4], alone, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
def test_mask_layouts(dtype, device):
    """Any strides and dtype, and no difference in a single bit."""
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
    """Reduced over whatever the mask is broadcast to."""
    sizes = (2, 4, 67, 150)
    shape = [n if f else 1 for n, f in zip(sizes, full, strict=True)]
    q, k, v = make(67, 150, dtype, device=device)
    mask = torch.randn(shape, device=device).to(dtype)
    if full[3]:
        check([q, k, v, mask])
    else:  # The same for all keys changes nothing: the gradient is 0 but for rounding errors.
        *_, dmask = outputs_and_gradients(attention, [q, k, v, mask])
        per_key = outputs_and_gradients(attention, [q, k, v, mask.expand(*shape[:3], 150)])[-1]
        assert dmask.shape == mask.shape
        assert dmask.abs().max() <= 0.02 * per_key.abs().sum(-1).max()


@each_dtype
@pytest.mark.parametrize("q_len", [1, 3, 4, 16, 17])
def test_decode(q_len, dtype, device):
    """A few queries against a long, strided cache; a row's bits do not depend on its batch."""
    k_len = 2500
    q, k, v = make(q_len, k_len, dtype, batch=3, heads=8, kv_heads=2, dim=40, device=device)
    cache = torch.full((2, 3, 2, 4096, 40), float("nan"), dtype=dtype, device=device)
    cache[0, :, :, :k_len], cache[1, :, :, :k_len] = k, v
    k, v = cache[0, :, :, :k_len], cache[1, :, :, :k_len]
    options = {"enable_gqa": True, "is_causal": True, "bottom_right": True}
    visible = torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)
    out, *_ = check([q, k, v], visible, **options)
    for b in range(3):
        alone = attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], **options)
        assert torch.equal(alone[0], out[b])
    ignored = torch.zeros(3, k_len, dtype=torch.bool, device=device)
    ignored[0, :1100], ignored[1] = True, True
    out = attention(q, k, v, key_padding_mask=ignored, **options)
    assert torch.equal(out[2], attention(q[2:], k[2:], v[2:], **options)[0])
    assert not out[1].any() and out[0].isfinite().all()


@each_dtype
def test_bits_do_not_depend_on_the_batch(dtype, device):
    args = [*make(130, 300, dtype, device=device), torch.randn(2, 1, 130, 300, device=device)]
    together = outputs_and_gradients(attention, args)
    for b in range(2):
        alone = [t.detach()[b : b + 1].requires_grad_() for t in args]
        out = attention(*alone)
        assert torch.equal(out[0], together[0][b])


@pytest.mark.parametrize("kind", ["mean", "per_head"])
@each_dtype
def test_weights(kind, dtype, device):
    q, k, v = make(67, 150, dtype, kv_heads=2, device=device)
    ignored = torch.zeros(2, 150, dtype=torch.bool, device=device)
    ignored[1, 100:] = True
    options = {"enable_gqa": True, "is_causal": True, "key_padding_mask": ignored}
    out, weights = attention(q, k, v, return_weights=kind, **options)
    assert torch.equal(out, attention(q, k, v, **options))
    right = attention(
        q.double(), k.double(), v.double(), return_weights=kind, **options, backend="reference"
    )[1]
    eager = attention(q, k, v, return_weights=kind, **options, backend="reference")[1]
    assert_accurate(weights, right, eager, "weights")
    assert weights.shape == ((2, 67, 150) if kind == "mean" else (2, 4, 67, 150))


@pytest.mark.parametrize("kind", ["mean", "per_head"])
def test_gradient_of_the_weights(kind, device):
    q, k, v = make(9, 20, device=device)
    bias = torch.randn(1, 4, 9, 20, device=device)

    def loss(q, k, v, bias, **options):
        torch.manual_seed(0)
        out, weights = attention(q, k, v, bias, 0.3, return_weights=kind, **options)
        return out.square().sum() + (weights * weights.detach().cos()).sum()

    def grads(dtype, **options):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v, bias)]
        return torch.autograd.grad(loss(*leaves, **options), leaves)

    actual, right = grads(torch.float32), grads(torch.float64)
    for a, exact in zip(actual, right, strict=True):
        torch.testing.assert_close(a, exact.float(), rtol=1e-4, atol=1e-5)


def test_dropout_is_the_one_mask(device):
    q, k, v = make(67, 150, device=device)
    torch.manual_seed(3)
    seed = draw_seed(q.device)
    torch.manual_seed(3)
    _, weights = attention(q, k, v, None, 0.4, return_weights="per_head")
    assert torch.equal(weights != 0, keep_mask(seed, 2 * 4 * 67, 150, 0.4).view(2, 4, 67, 150))
    torch.manual_seed(3)
    again = attention(q, k, v, None, 0.4)
    expected = explicit(q, k, v)
    torch.testing.assert_close(again, weights @ v, rtol=1e-4, atol=1e-5)
    mean = torch.stack([attention(q, k, v, None, 0.4) for _ in range(400)]).mean(0)
    assert (mean - expected).abs().mean() < 0.15 * expected.abs().mean()


def packed(lengths, total_heads, dtype, device):
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return torch.randn(sum(lengths), total_heads, 24, device=device).to(dtype), cu


@each_dtype
@pytest.mark.parametrize("bottom_right", [None, False, True], ids=["full", "causal", "bottom"])
def test_packed_sequences(bottom_right, dtype, device):
    """Each sequence as if it were alone, to the bit on the CPU."""
    torch.manual_seed(0)
    q, cu_q = packed([5, 0, 70, 1, 130], 4, dtype, device)
    k, cu_k = packed([7, 3, 70, 150, 131], 2, dtype, device)
    v = torch.randn_like(k)
    options = {"enable_gqa": True, "is_causal": bottom_right is not None}
    options["bottom_right"] = bool(bottom_right)
    actual = outputs_and_gradients(
        lambda *a: attention(*a, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options), [q, k, v]
    )
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    pieces = []
    for i in range(5):
        rows, cols = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        one = [t[s].transpose(0, 1)[None] for t, s in zip(leaves, (rows, cols, cols), strict=True)]
        pieces.append(attention(*one, **options)[0].transpose(0, 1))
    out = torch.cat(pieces)
    generator = torch.Generator().manual_seed(7)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(device, dtype)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0 if device == "cpu" else 1e-2)


def test_bad_calls(device):
    q, k, v = make(9, 20, device=device)
    i32 = {"dtype": torch.int32, "device": device}
    cu = torch.tensor([0, 9], **i32)
    flat = [t[0].transpose(0, 1) for t in (q, k, v)]
    wrong = [
        (ValueError, r"\[2, 4, 9, 25\]", (torch.cat([q, q[..., :1]], -1), k, v), {}),
        (ValueError, "enable_gqa", (q, k[:, :2], v[:, :2]), {}),
        (ValueError, "4 query heads cannot share 3", (q, k[:, :3], v[:, :3]), {"enable_gqa": True}),
        (ValueError, "257", (torch.ones(1, 1, 2, 257),) * 3, {}),
        (ValueError, r"\[1, 1, 1, 7\]", (q, k, v, torch.ones(7, device=device)), {}),
        (TypeError, "int64", (q, k, v, torch.ones(9, 20, dtype=torch.int64)), {}),
        (TypeError, "bfloat16", (q, k.bfloat16(), v), {}),
        (ValueError, r"\[2, 19\]", (q, k, v), {"key_padding_mask": torch.ones(2, 19).bool()}),
        (TypeError, "float32", (q, k, v), {"key_padding_mask": torch.ones(2, 20)}),
        (ValueError, "is_causal", (q, k, v), {"bottom_right": True}),
        (ValueError, "'all'", (q, k, v), {"return_weights": "all"}),
        (ValueError, "1.5", (q, k, v, None, 1.5), {}),
        (ValueError, "both", flat, {"cu_seqlens_q": cu}),
        (TypeError, "int64", flat, {"cu_seqlens_q": cu.long(), "cu_seqlens_k": cu.long()}),
        (
            ValueError,
            "attn_mask does not go",
            (*flat, torch.ones(9, 20)),
            {"cu_seqlens_q": cu, "cu_seqlens_k": cu},
        ),
        (ValueError, "dimensions", (q[0, 0], k[0, 0], v[0, 0]), {}),
    ]
    for error, message, args, options in wrong:
        args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
        with pytest.raises(error, match=message):
            attention(*args, **options)


@pytest.mark.parametrize(
    "cuts, message", [([0, 12, 9], "fall"), ([0, 4, 8], "8"), ([1, 4, 9], "1")]
)
def test_cu_seqlens_out_of_range(cuts, message):
    q = torch.randn(9, 2, 8)
    cu = torch.tensor(cuts, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu)


def test_forms(device):
    """Without heads, with a negative scale, with tensors that share memory."""
    q, k, v = make(9, 20, device=device)
    torch.testing.assert_close(attention(q[:, 0], k[:, 0], v[:, 0]), explicit(q, k, v)[:, 0])
    mask = torch.randn(2, 9, 20, device=device)
    with_mask = explicit(q, k, v, mask[:, None])[:, 0]
    torch.testing.assert_close(attention(q[:, 0], k[:, 0], v[:, 0], mask), with_mask)
    for scale in (-0.7, 0.0, 3.0):
        expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
        torch.testing.assert_close(attention(q, k, v, scale=scale), expected)
    torch.testing.assert_close(attention(k, k, k), explicit(k, k, k))
