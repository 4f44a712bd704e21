"""Cases of attention. A shape is (batch, heads, q_len, k_len, head_dim)."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels.cases.case import Case
from llmos_kernels.ops import attention
from llmos_kernels.ops._dropout import draw_seed


def _make(shape, mask=None, padding=None, kv_heads=None, v_dim=None, packed=False, **options):
    """query, key, value, attn_mask, key_padding_mask, cu_seqlens; every row sees a key."""
    batch, heads, q_len, k_len, dim = shape
    kv_heads, v_dim = kv_heads or heads, v_dim or dim
    q, k, v = (
        torch.randn(batch, length, n, d, dtype=options.get("dtype"), device=options.get("device"))
        .transpose(1, 2)
        .requires_grad_(options.get("requires_grad", False))
        for length, n, d in ((q_len, heads, dim), (k_len, kv_heads, dim), (k_len, kv_heads, v_dim))
    )
    if packed:
        q, k, v = (t.detach()[0].transpose(0, 1).requires_grad_(t.requires_grad) for t in (q, k, v))
        return q, k, v, None, None, *_cu_seqlens(q_len, k_len, q.device)
    attn_mask = None
    if mask == "bool":
        attn_mask = torch.rand(batch, 1, q_len, k_len, device=q.device) < 0.7
        attn_mask[..., :1] = True
    elif mask is not None:
        if mask[-1] == "1":  # The same for all keys changes nothing: its gradient is 0, and noise.
            options["requires_grad"] = False
        full = {"b": batch, "h": heads, "q": q_len, "k": k_len, "1": 1}
        attn_mask = torch.randn([full[c] for c in mask], **options)
    key_padding_mask = None
    if padding:
        # Lengths from 20 % to 100 %, 60 % in the mean.
        column, filled = torch.arange(k_len, device=q.device), torch.arange(batch) * 2 + 1
        lengths = (k_len * (0.2 + 0.4 * filled / batch)).ceil().to(q.device, torch.int64)
        key_padding_mask = column >= lengths[:, None]
        if padding == "holes":
            key_padding_mask[1::2] = column % 3 == 1
    return q, k, v, attn_mask, key_padding_mask


def _cu_seqlens(q_len, k_len, device):
    """Three sequences, the second of them empty."""
    cuts = [[0, n // 3, n // 3, n] for n in (q_len, k_len)]
    return [torch.tensor(c, dtype=torch.int32, device=device) for c in cuts]


def _call(fn, options, q, k, v, attn_mask, padding, cu_q=None, cu_k=None, **more):
    if padding is not None:
        more["key_padding_mask"] = padding
    if cu_q is not None:
        more |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    return fn(q, k, v, attn_mask, **options, **more)


def _visible(q_len, k_len, options, padding, device) -> Tensor | None:
    visible = None
    if options.get("is_causal"):
        diagonal = k_len - q_len if options.get("bottom_right") else 0
        visible = torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(diagonal)
    if padding is not None:
        seen = ~padding[:, None, None]
        visible = seen if visible is None else visible & seen
    return visible


def _sdpa(q, k, v, attn_mask, padding, options, dropout_p=0.0):
    """What is written with torch: one mask for all there is to mask."""
    visible = _visible(q.shape[2], k.shape[2], options, padding, q.device)
    if visible is not None:
        if attn_mask is None:
            attn_mask = visible
        elif attn_mask.dtype == torch.bool:
            attn_mask = attn_mask & visible
        else:
            attn_mask = attn_mask.masked_fill(~visible, float("-inf"))
    # For other layouts torch leaves its flash kernel, whose error is the yardstick.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    gqa = {"enable_gqa": True} if options.get("enable_gqa") else {}
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask, dropout_p, scale=options.get("scale"), **gqa
    )


def _eager(options, q, k, v, attn_mask, padding, cu_q=None, cu_k=None):
    """SDPA, or the explicit ops where it has no way to give the same."""
    if cu_q is not None:
        pieces = []
        for i in range(len(cu_q) - 1):
            own = (slice(*cu_q[i : i + 2].tolist()), slice(*cu_k[i : i + 2].tolist()))
            one_q, one_k, one_v = (
                t[s].transpose(0, 1)[None]
                for t, s in zip((q, k, v), own[:1] + own[1:] * 2, strict=True)
            )
            if one_q.shape[2]:
                pieces.append(_sdpa(one_q, one_k, one_v, None, None, options)[0].transpose(0, 1))
        return torch.cat(pieces)
    dropout_p, kind = options.get("dropout_p", 0.0), options.get("return_weights")
    if not dropout_p and not kind:
        return _sdpa(q, k, v, attn_mask, padding, options)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    visible = _visible(q.shape[2], k.shape[2], options, padding, q.device)
    if attn_mask is not None:
        logits = logits + attn_mask
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    weights = logits.softmax(-1)
    if dropout_p:
        weights = weights * attention.dropout_factors(weights, draw_seed(q.device), dropout_p, None)
    out = weights @ v
    if not kind:
        return out
    weights = weights.to(out.dtype)  # Under autocast the softmax is float32.
    return out, weights.mean(1) if kind == "mean" else weights


def _rival(options, dropout_p, q, k, v, attn_mask, padding):
    if options.get("is_causal") and attn_mask is None and padding is None:
        return F.scaled_dot_product_attention(q, k, v, None, dropout_p, True)
    return _sdpa(q, k, v, attn_mask, padding, options, dropout_p)


#: Empty, one, neighbours of powers of two, one query, many keys.
SHAPES = (
    (0, 2, 3, 4, 8),
    (2, 2, 0, 4, 8),
    (1, 1, 1, 1, 1),
    (2, 2, 1, 65, 8),
    (2, 1, 63, 64, 40),
    (1, 2, 65, 63, 64),
    (2, 1, 5, 1000, 33),
    (1, 2, 127, 130, 72),
    (1, 1, 33, 40, 256),
    (1, 1, 193, 129, 16),
)
_FEW = ((2, 2, 1, 65, 8), (2, 4, 64, 65, 40), (2, 2, 33, 130, 72))


def _case(name, *, sizes=(), gpu_sizes=(), shapes=_FEW, make=None, heads=2, **options):
    dropout_p = options.get("dropout_p")
    packed = bool(make and make.get("packed"))
    causal = (
        options == {"is_causal": True} and not packed
    )  # torch has kernels that skip what it hides.
    batch = 1 if packed else 2
    return Case(
        f"attention{name}",
        functools.partial(_call, attention.scaled_dot_product_attention, options),
        functools.partial(_call, attention.scaled_dot_product_attention_reference, options),
        functools.partial(_eager, options),
        functools.partial(_make, **(make or {})),
        shapes,
        sizes,
        gpu_sizes,
        rival=functools.partial(_rival, options, dropout_p or 0.0) if dropout_p or causal else None,
        sized=lambda n: (batch, heads, n, n + 3, 16),
        tiny=(batch, heads, 3, 4, 3),
        medium=(batch, heads, 67, 129, 24),
        widths=(64, 128, 256),
        row_wise=False,
    )


_LONG = (1, 16, 2048, 2048, 64)
_GPU = ((4, 16, 4096, 4096, 128), (16, 12, 512, 512, 64))

ATTENTION = (
    _case(
        "",
        shapes=SHAPES,
        sizes=((8, 12, 128, 128, 64), _LONG, (1, 32, 1, 2048, 128), (4, 12, 256, 256, 64)),
        gpu_sizes=(*_GPU, (1, 32, 1, 8192, 128)),
    ),
    _case("-causal", shapes=SHAPES, is_causal=True, sizes=(_LONG,), gpu_sizes=_GPU),
    _case("-bottom_right", is_causal=True, bottom_right=True),
    _case("-bool_mask", make={"mask": "bool"}),
    _case(
        "-bias",
        make={"mask": "1hqk"},
        shapes=(*_FEW, (2, 2, 5, 1000, 33)),
        sizes=((2, 12, 512, 512, 64),),
        gpu_sizes=_GPU[1:],
    ),
    _case("-bias_batch", make={"mask": "b1qk", "padding": "holes"}, is_causal=True),
    _case("-bias_keys", make={"mask": "b11k"}),
    _case("-bias_queries", make={"mask": "hq1"}),
    _case(
        "-padding",
        make={"padding": "right"},
        shapes=(*_FEW, (3, 2, 5, 1000, 33)),
        sizes=((8, 12, 512, 512, 64),),
        gpu_sizes=_GPU[1:],
    ),
    _case(
        "-gqa",
        make={"kv_heads": 2},
        heads=6,
        shapes=((2, 4, 1, 130, 16), (1, 6, 33, 65, 40)),
        enable_gqa=True,
        is_causal=True,
        bottom_right=True,
    ),
    _case("-v_dim", make={"v_dim": 24}, scale=0.3),
    _case("-dropout", dropout_p=0.2, sizes=((8, 12, 128, 128, 64),), gpu_sizes=_GPU[1:]),
    _case(
        "-packed",
        make={"packed": True},
        shapes=((1, 2, 70, 135, 24), (1, 2, 3, 9, 8)),
        is_causal=True,
    ),
    _case("-weights", make={"padding": "holes", "mask": "1hqk"}, return_weights="mean"),
    _case("-weights-dropout", return_weights="per_head", dropout_p=0.3, is_causal=True),
)
