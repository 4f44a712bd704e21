"""The arguments of ``scaled_dot_product_attention``, checked and in the form that kernels take."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llmos_kernels._core.errors import ArgumentError, DtypeError
from llmos_kernels._core.registry import KERNEL_DTYPES
from llmos_kernels.ops._autocast import autocast, autocast_dtype
from llmos_kernels.ops._dropout import check_dropout

__all__: list[str] = []

#: The values of ``causal``: no mask, or a diagonal from the top left or to the bottom right corner.
NOT_CAUSAL, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2
#: The largest head dim that kernels take.
MAX_DIM = 256
_NO_DIMENSIONS = torch.Size()


class AttentionTensors(NamedTuple):
    """The tensor arguments of kernels; varlen sequences are a batch of 1."""

    query: Tensor  # [batch, heads, q_len, head_dim]
    key: Tensor  # [batch, kv_heads, k_len, head_dim]
    value: Tensor  # [batch, kv_heads, k_len, v_dim]
    attn_mask: Tensor | None  # Four dimensions that broadcast to [batch, heads, q_len, k_len].
    key_padding_mask: Tensor | None  # [batch, k_len], bool, True where a key is ignored.
    cu_seqlens_q: Tensor | None  # [sequences + 1], int32.
    cu_seqlens_k: Tensor | None
    sinks: Tensor | None = None  # [heads], a logit of every row that has no value.


class AttentionOptions(NamedTuple):
    """The other arguments of kernels."""

    scale: float  # 0 or more.
    causal: int  # NOT_CAUSAL, TOP_LEFT or BOTTOM_RIGHT.
    dropout_p: float
    softcap: float = 0.0  # 0 for none.


class Arguments(NamedTuple):
    """A checked call: what kernels take, and the form in which the caller gets the results."""

    tensors: AttentionTensors
    options: AttentionOptions
    return_weights: str | None  # None, "mean" or "per_head".
    form: str  # "heads", "no heads", "varlen" or "leading": the form of the caller's query.
    leading: torch.Size  # The leading dimensions of the caller's result, if "leading".

    def shaped(self, out: Tensor, weights: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return ``out`` [batch, q_len, heads, v_dim] in the caller's form, with weights if any."""
        if self.form == "varlen":
            return out.squeeze(0)
        if self.form == "leading":
            return out.transpose(1, 2).reshape(*self.leading, *out.shape[1::2])
        out = out.squeeze(2) if self.form == "no heads" else out.transpose(1, 2)
        if self.return_weights is None:
            return out
        assert weights is not None
        if self.form == "no heads" and self.return_weights == "per_head":
            weights = weights.squeeze(1)
        return out, weights

    def with_views(self) -> "Arguments":
        """Return the same call with query, key and value three different tensor objects."""
        key, value = self.tensors.key, self.tensors.value
        tensors = self.tensors._replace(key=key.view_as(key), value=value.view_as(value))
        return self._replace(tensors=tensors)


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    bottom_right: bool,
    return_weights: str | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Arguments:
    """Return the arguments as kernels take them, or raise ArgumentError or DtypeError."""
    check_dropout(dropout_p)
    _check_dtypes(query, key, value, attn_mask, sinks)
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    form, leading = "heads", _NO_DIMENSIONS
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        form = "varlen"
        _check_varlen(
            query, cu_seqlens_q, cu_seqlens_k, attn_mask, key_padding_mask, return_weights
        )
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        _check_shapes(query, key, value, enable_gqa)
    elif (
        not query.ndim == key.ndim == value.ndim == 4
        or _disagreement(query, key, value, enable_gqa) is not None
    ):
        query, key, value, attn_mask, form, leading = _by_head(
            query, key, value, attn_mask, enable_gqa
        )
        _check_shapes(query, key, value, enable_gqa)
    if form == "leading" and (key_padding_mask is not None or return_weights is not None):
        raise ValueError(
            "key_padding_mask and return_weights take tensors of 3 or 4 dimensions with the batch"
            f" first, the query has the leading dimensions {list(leading)}"
        )
    if attn_mask is not None:
        attn_mask = _check_mask(attn_mask, query, key)
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ArgumentError(f"sinks must be [heads] = [{query.shape[1]}], got {list(sinks.shape)}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive finite number or None, got {softcap}")
    if key_padding_mask is not None:
        _check_padding(key_padding_mask, query, key)
    if bottom_right and not is_causal:
        raise ValueError("bottom_right says how is_causal aligns: it needs is_causal=True")
    if return_weights not in (None, "mean", "per_head"):
        raise ValueError(
            f"return_weights must be None, 'mean' or 'per_head', got {return_weights!r}"
        )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if scale < 0:  # Kernels scale after they took the maximum of a row.
        query, scale = -query, -scale
    causal = (BOTTOM_RIGHT if bottom_right else TOP_LEFT) if is_causal else NOT_CAUSAL
    return Arguments(
        AttentionTensors(
            query, key, value, attn_mask, key_padding_mask, cu_seqlens_q, cu_seqlens_k, sinks
        ),
        AttentionOptions(scale, causal, dropout_p, softcap or 0.0),
        return_weights,
        form,
        leading,
    )


def _check_dtypes(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, sinks: Tensor | None
) -> None:
    """Raise where dtypes or devices disagree."""
    if query.dtype not in KERNEL_DTYPES and query.dtype != torch.float64:
        raise DtypeError(
            f"expected float32, bfloat16, float16 or float64 tensors, got {query.dtype}"
        )
    for name, t in (("key", key), ("value", value)):
        if t.dtype != query.dtype and not autocast_dtype(query):
            raise DtypeError(f"{name} must have the dtype of query, {query.dtype}, got {t.dtype}")
        if t.device != query.device:
            raise ArgumentError(f"{name} is on {t.device}, query on {query.device}")
    if attn_mask is None and sinks is None:
        return
    floating = (query.dtype, *KERNEL_DTYPES)
    for name, given, dtypes, shown in (
        ("attn_mask", attn_mask, (torch.bool, *floating), "bool, "),
        ("sinks", sinks, floating, ""),
    ):
        if given is None:
            continue
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {given!r}")
        if given.dtype not in dtypes:
            raise DtypeError(f"{name} must be {shown}of a floating dtype, got {given.dtype}")
        if given.device != query.device:
            raise ArgumentError(f"{name} is on {given.device}, query on {query.device}")


def _shown(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"


def _disagreement(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> str | None:
    """Return what is wrong with tensors [batch, heads, length, head_dim], or None."""
    batch, heads, _, dim = query.shape
    v_dim = value.shape[3]
    if key.shape[0] != batch or key.shape[3] != dim or value.shape[:3] != key.shape[:3]:
        shown = _shown(query, key, value)
        return f"the shapes disagree as [batch, heads, length, head_dim]: {shown}"
    if not (1 <= dim <= MAX_DIM and 1 <= v_dim <= MAX_DIM):
        shown = _shown(query, key, value)
        return f"head dims must be from 1 to {MAX_DIM}, got {dim} and {v_dim}: {shown}"
    kv_heads = key.shape[1]
    if kv_heads != heads and not enable_gqa:
        return f"query has {heads} heads, key {kv_heads}: that takes enable_gqa=True"
    if kv_heads == 0 or heads % kv_heads:
        return f"{heads} query heads cannot share {kv_heads} key heads"
    return None


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise where tensors [batch, heads, length, head_dim] disagree."""
    wrong = _disagreement(query, key, value, enable_gqa)
    if wrong is not None:
        raise ArgumentError(wrong)


def _by_head(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, str, torch.Size]:
    """Return tensors [..., length, dim] as [batch, heads, length, dim], the form, and leading.

    Leading dimensions broadcast. That of heads does not with ``enable_gqa``; more than two are one
    batch; a single one is the batch, or the heads where query and key differ in it.
    """
    if min(query.ndim, key.ndim, value.ndim) < 2:
        raise ArgumentError(
            f"two dimensions at least, [..., length, head_dim], got {_shown(query, key, value)}"
        )
    rank = max(query.ndim, key.ndim, value.ndim)
    if not rank == query.ndim == key.ndim == value.ndim:
        query, key, value = (t[(None,) * (rank - t.ndim)] for t in (query, key, value))
    kept = 3 if enable_gqa and rank > 2 else 2
    given = [t.shape[:-kept] for t in (query, key, value)]
    if not given[0] == given[1] == given[2]:
        try:
            shape = torch.broadcast_shapes(*given)
        except RuntimeError:
            shown = _shown(query, key, value)
            raise ArgumentError(
                f"the leading dimensions do not broadcast: {shown}. Query heads that share a key"
                " head take enable_gqa=True"
            ) from None
        query, key, value = (t.expand(*shape, *t.shape[-kept:]) for t in (query, key, value))
    leading = query.shape[:-2]
    if rank == 4:
        return query, key, value, attn_mask, "heads", leading
    form = "leading"
    if rank == 2:
        query, key, value = (t[None, None] for t in (query, key, value))
    elif rank > 4:
        query, key, value = (t.flatten(0, rank - 4) for t in (query, key, value))
        attn_mask = _one_batch(attn_mask, leading[:-1])
    elif query.shape[0] != key.shape[0]:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
    else:
        form = "no heads"
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unsqueeze(1)
    return query, key, value, attn_mask, form, leading


def _one_batch(attn_mask: Tensor | None, batch: tuple[int, ...]) -> Tensor | None:
    """Return a mask with its batch dimensions, which broadcast to ``batch``, as one."""
    if attn_mask is None or attn_mask.ndim < 4:
        return attn_mask
    sizes = attn_mask.shape[:-3]
    pairs = zip(reversed(sizes), reversed(batch), strict=False)
    if len(sizes) > len(batch) or not all(m == 1 or m == n for m, n in pairs):
        raise ArgumentError(
            f"attn_mask {list(attn_mask.shape)} does not broadcast to the batch {list(batch)}"
        )
    if all(m == 1 for m in sizes):
        return attn_mask.flatten(0, -4)
    return attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, -4)


def _check_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the mask with four dimensions, or raise where it does not broadcast."""
    full = (*query.shape[:3], key.shape[2])
    while attn_mask.ndim < 4:
        attn_mask = attn_mask.unsqueeze(0)
    # Dynamo does not find a number among symbols by ``in``.
    fits = all(m == 1 or m == n for m, n in zip(attn_mask.shape, full, strict=False))
    if attn_mask.ndim > 4 or not fits:
        raise ArgumentError(
            f"attn_mask must broadcast to {list(full)}, got {list(attn_mask.shape)}"
        )
    return attn_mask


def _check_padding(key_padding_mask: Tensor, query: Tensor, key: Tensor) -> None:
    """Raise unless the mask is bool [batch, k_len], beside the query."""
    shape = (query.shape[0], key.shape[2])
    if key_padding_mask.dtype != torch.bool:
        raise DtypeError(f"key_padding_mask must be bool, got {key_padding_mask.dtype}")
    if key_padding_mask.shape != shape:
        raise ArgumentError(
            f"key_padding_mask must be [batch, k_len] = {list(shape)},"
            f" got {list(key_padding_mask.shape)}"
        )
    if key_padding_mask.device != query.device:
        raise ArgumentError(
            f"key_padding_mask is on {key_padding_mask.device}, query on {query.device}"
        )


def _check_varlen(
    query: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    return_weights: str | None,
) -> None:
    """Raise where the arguments of varlen sequences disagree."""
    if cu_q is None or cu_k is None:
        raise ValueError("varlen sequences take both cu_seqlens_q and cu_seqlens_k")
    if query.ndim != 3:
        raise ArgumentError(
            f"with cu_seqlens, query is [total_q, heads, head_dim], got {list(query.shape)}"
        )
    for name, given in (
        ("attn_mask", attn_mask),
        ("key_padding_mask", key_padding_mask),
        ("return_weights", return_weights),
    ):
        if given is not None:
            raise ValueError(
                f"{name} does not go with cu_seqlens: varlen sequences hold no padding"
            )
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if cu.dtype != torch.int32:
            raise DtypeError(f"{name} must be int32, got {cu.dtype}")
        if cu.ndim != 1 or cu.shape != cu_q.shape or cu.shape[0] < 2:
            raise ArgumentError(
                "cu_seqlens_q and cu_seqlens_k must be [sequences + 1],"
                f" got {list(cu_q.shape)} and {list(cu_k.shape)}"
            )
        if cu.device != query.device:
            raise ArgumentError(f"{name} is on {cu.device}, query on {query.device}")
