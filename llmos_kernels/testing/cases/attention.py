"""Cases of attention. A shape is (batch, heads, q_len, k_len, head_dim)."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels.ops import attention
from llmos_kernels.ops._attention_reference import dropout_factors
from llmos_kernels.ops._dropout import draw_seed
from llmos_kernels.testing.cases.case import Case


def _make(
    shape: tuple[int, ...],
    mask: str | None = None,
    padding: str | None = None,
    kv_heads: int | None = None,
    v_dim: int | None = None,
    varlen: bool = False,
    sinks: bool = False,
    **options: Any,
) -> tuple:
    """Return query, key, value, attn_mask, key_padding_mask, both cu_seqlens and sinks.

    Without ``varlen`` the cu_seqlens are None; what is None at the end is left out.

    Args:
        shape: (batch, heads, q_len, k_len, head_dim).
        mask: "bool", or the dimensions of a float mask, such as "1hqk"; 1 is a broadcast dimension.
        padding: "right" pads sequences at their ends; with "holes" every second sequence hides
            every third key instead.
        kv_heads: The heads of key and value; ``heads`` by default.
        v_dim: The head dim of value; ``head_dim`` by default.
        varlen: Whether to return varlen sequences, [length, heads, head_dim].
        sinks: Whether to return sinks, [heads].
        options: dtype, device and requires_grad.

    Every query sees at least one key.
    """
    batch, heads, q_len, k_len, dim = shape
    kv_heads, v_dim = kv_heads or heads, v_dim or dim
    q, k, v = (
        torch.randn(batch, length, n, d, dtype=options.get("dtype"), device=options.get("device"))
        .transpose(1, 2)
        .requires_grad_(options.get("requires_grad", False))
        for length, n, d in ((q_len, heads, dim), (k_len, kv_heads, dim), (k_len, kv_heads, v_dim))
    )
    extra = (torch.randn(heads, **options),) if sinks else ()
    if varlen:
        q, k, v = (t.detach()[0].transpose(0, 1).requires_grad_(t.requires_grad) for t in (q, k, v))
        return q, k, v, None, None, *_cu_seqlens(q_len, k_len, q.device), *extra
    attn_mask = None
    if mask == "bool":
        attn_mask = torch.rand(batch, 1, q_len, k_len, device=q.device) < 0.7
        attn_mask[..., :1] = True
    elif mask is not None:
        # A mask that is equal for all keys has no effect: its gradient is 0 but for rounding.
        if mask[-1] == "1":
            options["requires_grad"] = False
        full = {"b": batch, "h": heads, "q": q_len, "k": k_len, "1": 1}
        attn_mask = torch.randn([full[c] for c in mask], **options)
    key_padding_mask = None
    if padding:
        # Lengths are spread between 20 % and 100 % of k_len, with a mean of 60 %.
        column, filled = torch.arange(k_len, device=q.device), torch.arange(batch) * 2 + 1
        lengths = (k_len * (0.2 + 0.4 * filled / batch)).ceil().to(q.device, torch.int64)
        key_padding_mask = column >= lengths[:, None]
        if padding == "holes":
            key_padding_mask[1::2] = column % 3 == 1
    return q, k, v, attn_mask, key_padding_mask, *((None, None, *extra) if sinks else ())


def _cu_seqlens(q_len: int, k_len: int, device: torch.device) -> list[Tensor]:
    """Return the offsets of three sequences, the second of them empty, for queries and keys."""
    offsets = [[0, n // 3, n // 3, n] for n in (q_len, k_len)]
    return [torch.tensor(c, dtype=torch.int32, device=device) for c in offsets]


def _call(
    fn: Callable,
    options: dict[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    sinks: Tensor | None = None,
    **keywords: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Call ``fn`` with the arguments that ``_make`` returned, ``options`` and ``keywords``."""
    if padding is not None:
        keywords["key_padding_mask"] = padding
    if cu_q is not None:
        keywords |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    if sinks is not None:
        keywords["sinks"] = sinks
    return fn(q, k, v, attn_mask, **options, **keywords)


def _visible(
    q_len: int,
    k_len: int,
    options: dict[str, Any],
    padding: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Return a bool mask, True where a query may see a key; None if every query sees all."""
    visible = None
    if options.get("is_causal"):
        diagonal = k_len - q_len if options.get("bottom_right") else 0
        visible = torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(diagonal)
    if padding is not None:
        seen = ~padding[:, None, None]
        visible = seen if visible is None else visible & seen
    return visible


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    options: dict[str, Any],
    dropout_p: float = 0.0,
) -> Tensor:
    """Return torch's SDPA with causal mask, padding and ``attn_mask`` merged into one mask."""
    visible = _visible(q.shape[2], k.shape[2], options, padding, q.device)
    if visible is not None:
        if attn_mask is None:
            attn_mask = visible
        elif attn_mask.dtype == torch.bool:
            attn_mask = attn_mask & visible
        else:
            attn_mask = attn_mask.masked_fill(~visible, float("-inf"))
    # The error budget is that of torch's flash kernel, which needs contiguous rows.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    gqa = {"enable_gqa": True} if options.get("enable_gqa") else {}
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask, dropout_p, scale=options.get("scale"), **gqa
    )


def _eager(
    options: dict[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the result by SDPA where it can give it, else by matrix products and softmax."""
    if cu_q is not None and cu_k is not None:
        pieces = []
        for i in range(len(cu_q) - 1):
            sequence = (slice(*cu_q[i : i + 2].tolist()), slice(*cu_k[i : i + 2].tolist()))
            one_q, one_k, one_v = (
                t[s].transpose(0, 1)[None]
                for t, s in zip((q, k, v), sequence[:1] + sequence[1:] * 2, strict=True)
            )
            if one_q.shape[2]:
                out = _eager(options, one_q, one_k, one_v, None, None, sinks=sinks)
                assert isinstance(out, Tensor)
                pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces)
    dropout_p, kind = options.get("dropout_p", 0.0), options.get("return_weights")
    softcap = options.get("softcap")
    if not dropout_p and not kind and softcap is None and sinks is None:
        return _sdpa(q, k, v, attn_mask, padding, options)
    if options.get("enable_gqa"):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    visible = _visible(q.shape[2], k.shape[2], options, padding, q.device)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        logits = logits + attn_mask
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], -1)
    weights = logits.softmax(-1)[..., : k.shape[2]]
    if dropout_p:
        weights = weights * dropout_factors(weights, draw_seed(q.device), dropout_p, None)
    out = weights @ v
    if not kind:
        return out
    weights = weights.to(out.dtype)  # Under autocast the softmax is float32.
    return out, weights.mean(1) if kind == "mean" else weights


def _baseline(
    options: dict[str, Any],
    dropout_p: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
) -> Tensor:
    """Return torch's SDPA with its own dropout, and with its causal kernel where that applies."""
    if options.get("is_causal") and attn_mask is None and padding is None:
        return F.scaled_dot_product_attention(q, k, v, None, dropout_p, True)
    return _sdpa(q, k, v, attn_mask, padding, options, dropout_p)


#: Empty, one element, neighbours of powers of two, one query, many keys.
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
_VARIANT_SHAPES = ((2, 2, 1, 65, 8), (2, 4, 64, 65, 40), (2, 2, 33, 130, 72))


def _case(
    name: str,
    *,
    benchmark_shapes: tuple = (),
    gpu_benchmark_shapes: tuple = (),
    shapes: tuple = _VARIANT_SHAPES,
    make: dict[str, Any] | None = None,
    heads: int = 2,
    **options: Any,
) -> Case:
    """Return the case of attention with ``options``; ``make`` are the options of ``_make``."""
    dropout_p = options.get("dropout_p", 0.0)
    varlen = bool(make and make.get("varlen"))
    batch = 1 if varlen else 2
    sinks = bool(make and make.get("sinks"))
    # torch has causal kernels that skip hidden keys, and none for sinks.
    causal = options == {"is_causal": True} and not varlen
    faster = (dropout_p or causal) and not sinks
    baseline = functools.partial(_baseline, options, dropout_p) if faster else None
    return Case(
        f"attention{name}",
        functools.partial(_call, attention.scaled_dot_product_attention, options),
        functools.partial(_call, attention.scaled_dot_product_attention_reference, options),
        functools.partial(_eager, options),
        functools.partial(_make, **(make or {})),
        shapes,
        benchmark_shapes,
        gpu_benchmark_shapes,
        baseline,
        small_shape=lambda n: (batch, heads, n, n + 3, 16),
        gradcheck_shape=(batch, heads, 3, 4, 3),
        multi_block_shape=(batch, heads, 67, 129, 24),
        compile_widths=(64, 128, 256),
        row_wise=False,
    )


_LONG = (1, 16, 2048, 2048, 64)
_GPU = ((4, 16, 4096, 4096, 128), (16, 12, 512, 512, 64))

ATTENTION = (
    _case(
        "",
        shapes=SHAPES,
        benchmark_shapes=(
            (8, 12, 128, 128, 64),
            _LONG,
            (1, 32, 1, 2048, 128),
            (4, 12, 256, 256, 64),
        ),
        gpu_benchmark_shapes=(*_GPU, (1, 32, 1, 8192, 128)),
    ),
    _case(
        "-causal",
        shapes=SHAPES,
        is_causal=True,
        benchmark_shapes=(_LONG,),
        gpu_benchmark_shapes=_GPU,
    ),
    _case("-bottom_right", is_causal=True, bottom_right=True),
    _case("-bool_mask", make={"mask": "bool"}),
    _case(
        "-bias",
        make={"mask": "1hqk"},
        shapes=(*_VARIANT_SHAPES, (2, 2, 5, 1000, 33)),
        benchmark_shapes=((2, 12, 512, 512, 64),),
        gpu_benchmark_shapes=_GPU[1:],
    ),
    _case("-bias_batch", make={"mask": "b1qk", "padding": "holes"}, is_causal=True),
    _case("-bias_keys", make={"mask": "b11k"}),
    _case("-bias_queries", make={"mask": "hq1"}),
    _case(
        "-padding",
        make={"padding": "right"},
        shapes=(*_VARIANT_SHAPES, (3, 2, 5, 1000, 33)),
        benchmark_shapes=((8, 12, 512, 512, 64),),
        gpu_benchmark_shapes=_GPU[1:],
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
    _case(
        "-dropout",
        dropout_p=0.2,
        benchmark_shapes=((8, 12, 128, 128, 64),),
        gpu_benchmark_shapes=_GPU[1:],
    ),
    _case(
        "-varlen",
        make={"varlen": True},
        shapes=((1, 2, 70, 135, 24), (1, 2, 3, 9, 8)),
        is_causal=True,
    ),
    _case("-weights", make={"padding": "holes", "mask": "1hqk"}, return_weights="mean"),
    _case("-weights-dropout", return_weights="per_head", dropout_p=0.3, is_causal=True),
    _case("-softcap", make={"mask": "1hqk"}, softcap=1.5, is_causal=True),
    _case("-sinks-dropout", make={"padding": "holes", "sinks": True}, dropout_p=0.2),
    _case("-sinks-weights", make={"mask": "bool", "sinks": True}, return_weights="mean"),
    _case(
        "-softcap-sinks-gqa",
        make={"kv_heads": 2, "sinks": True},
        heads=6,
        shapes=((1, 4, 1, 1030, 16), (1, 6, 33, 65, 40)),
        enable_gqa=True,
        is_causal=True,
        bottom_right=True,
        softcap=1.5,
    ),
    _case(
        "-softcap-sinks-varlen",
        make={"varlen": True, "sinks": True},
        shapes=((1, 2, 70, 135, 24), (1, 2, 3, 9, 8)),
        is_causal=True,
        softcap=1.5,
    ),
)
