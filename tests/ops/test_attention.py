"""Attention beyond the tests of every op: torch's semantics, lengths, decoding, varlen."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from attention_checks import (
    check,
    compare,
    explicit,
    make,
    math,
    outputs_and_gradients,
    results,
    worse,
)

from llmos_kernels import scaled_dot_product_attention as attention
from llmos_kernels import testing
from llmos_kernels.ops._dropout import draw_seed, keep_mask
from llmos_kernels.testing import DTYPES, assert_accurate

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = ((1, 1), (1, 65), (63, 64), (64, 193), (130, 129))


@each_dtype
@pytest.mark.parametrize("gqa", [False, True], ids=["", "gqa"])
@pytest.mark.parametrize("padding", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_is_torchs_math(mask, causal, padding, gqa, dtype, device):
    """Outputs and gradients agree with torch's math kernel in float64 for every combination."""

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


@each_dtype
@pytest.mark.parametrize("q_len", [1, 3, 4, 16, 17])
def test_decode(q_len, dtype, device):
    """A few queries attend to a long strided KV cache; a row's bits do not depend on its batch."""
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


def varlen(lengths, total_heads, dtype, device):
    """Return random varlen sequences [total, heads, 24] and their cu_seqlens."""
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return torch.randn(sum(lengths), total_heads, 24, device=device).to(dtype), cu


@each_dtype
@pytest.mark.parametrize("bottom_right", [None, False, True], ids=["full", "causal", "bottom"])
def test_varlen_sequences(bottom_right, dtype, device):
    """Each sequence gives the result that it gives alone, with the same bits on the CPU."""
    torch.manual_seed(0)
    q, cu_q = varlen([5, 0, 70, 1, 130], 4, dtype, device)
    k, cu_k = varlen([7, 3, 70, 150, 131], 2, dtype, device)
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
        sequence = [
            t[s].transpose(0, 1)[None] for t, s in zip(leaves, (rows, cols, cols), strict=True)
        ]
        pieces.append(attention(*sequence, **options)[0].transpose(0, 1))
    out = torch.cat(pieces)
    generator = testing.generator(7)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(device, dtype)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0 if device == "cpu" else 1e-2)


def test_bad_calls(device):
    q, k, v = make(9, 20, device=device)
    i32 = {"dtype": torch.int32, "device": device}
    cu = torch.tensor([0, 9], **i32)
    flat = [t[0].transpose(0, 1) for t in (q, k, v)]
    bias, padding = torch.ones(9, 20, device=device), torch.ones(2, 20, device=device).bool()
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
        (ValueError, "two dimensions", (q[0, 0, 0], k[0, 0], v[0, 0]), {}),
        (ValueError, "do not broadcast", (q[:, 0], k[:1, 0].expand(3, -1, -1), v[:1, 0]), {}),
        (ValueError, "to the batch", (*(t[None] for t in (q, k, v)), bias.expand(3, 4, 9, 20)), {}),
        (ValueError, "3 or 4", (q[0, 0], k[0, 0], v[0, 0]), {"return_weights": "mean"}),
        (ValueError, r"\[1, 2, 4\]", [t[None] for t in (q, k, v)], {"key_padding_mask": padding}),
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
    """Inputs without a head dimension, negative scales and shared tensors work as in torch."""
    q, k, v = make(9, 20, device=device)
    torch.testing.assert_close(attention(q[:, 0], k[:, 0], v[:, 0]), explicit(q, k, v)[:, 0])
    mask = torch.randn(2, 9, 20, device=device)
    with_mask = explicit(q, k, v, mask[:, None])[:, 0]
    torch.testing.assert_close(attention(q[:, 0], k[:, 0], v[:, 0], mask), with_mask)
    for scale in (-0.7, 0.0, 3.0):
        expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
        torch.testing.assert_close(attention(q, k, v, scale=scale), expected)
    torch.testing.assert_close(attention(k, k, k), explicit(k, k, k))


#: The shapes of query, key, value and mask, and whether heads are grouped.
LEADING = [
    ((9, 24), (20, 24), (20, 7), (9, 20), False),
    ((3, 9, 24), (2, 3, 20, 24), (2, 1, 20, 24), (1, 20), False),
    ((2, 4, 9, 24), (1, 4, 20, 24), (4, 20, 24), (4, 1, 20), False),
    ((2, 1, 9, 24), (2, 4, 20, 24), (20, 24), (2, 1, 9, 20), False),
    ((1, 9, 24), (3, 20, 24), (3, 20, 24), (3, 9, 20), False),
    ((2, 3, 4, 9, 24), (2, 3, 4, 20, 24), (2, 3, 4, 20, 24), (2, 1, 4, 9, 20), False),
    ((2, 3, 4, 9, 24), (3, 1, 20, 24), (2, 1, 4, 20, 24), (3, 1, 9, 20), False),
    ((2, 1, 1, 4, 9, 24), (3, 2, 4, 20, 24), (4, 20, 24), (1, 1, 4, 9, 20), False),
    ((4, 9, 24), (2, 20, 24), (2, 20, 24), (4, 9, 20), True),
    ((2, 4, 9, 24), (1, 2, 20, 24), (2, 20, 24), (4, 9, 20), True),
    ((2, 3, 4, 9, 24), (3, 2, 20, 24), (2, 1, 2, 20, 24), (3, 1, 9, 20), True),
]


@each_dtype
@pytest.mark.parametrize("shapes", LEADING, ids=lambda s: f"{s[0]}{' gqa' * s[4]}")
def test_leading_dimensions(shapes, dtype, device):
    """Any leading dimensions work and broadcast as in torch, with gradients of their own shapes."""
    *shapes, gqa = shapes
    args = [torch.randn(s, device=device).to(dtype) for s in shapes]
    for given in (args[:3], args, [*args[:3], args[3] > -1]):
        calls = ((attention, None), (math, torch.float64), (math, None))
        compare([outputs_and_gradients(f, given, t, enable_gqa=gqa) for f, t in calls])


def test_leading_dimensions_of_size_0():
    """A batch of nothing broadcasts too."""
    args = [torch.randn(s).requires_grad_() for s in ((0, 3, 4, 9, 24), (3, 4, 20, 24))]
    out = attention(args[0], args[1], args[1])
    out.sum().backward()
    assert out.shape == args[0].shape and not args[1].grad.any()


@pytest.mark.parametrize("shapes", LEADING[::3], ids=lambda s: str(s[0]))
def test_leading_dimensions_compiled(shapes):
    """They are traced whole, and broadcast in the compiled graph; sizes are symbols there."""
    torch.compiler.reset()
    *shapes, gqa = shapes
    args = [torch.randn(s) for s in shapes]
    call = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    out, expected = (f(*args, enable_gqa=gqa) for f in (call, attention))
    torch.testing.assert_close(out, expected)
