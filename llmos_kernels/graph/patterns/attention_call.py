"""The fused call that takes the place of attention that is written out."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmos_kernels._core.registry import KERNEL_DTYPES
from llmos_kernels.graph.einsum import Order
from llmos_kernels.graph.patterns.lazy_weights import lazy_weights
from llmos_kernels.graph.patterns.pattern import broadcasts, probability
from llmos_kernels.graph.site import Call, are_plain, is_autocast
from llmos_kernels.ops._attention_arguments import MAX_DIM
from llmos_kernels.ops.attention import scaled_dot_product_attention


class Mask(NamedTuple):
    """A mask of the logits.

    Args:
        kind: "add" for what is added, "hide" for a bool that is True where a key is hidden, "show"
            for one that is True where it is seen, "zero" where it is hidden for a mask of 0.
        factor: what the logits are multiplied by after the addition.
        flat: whether batch and heads are one dimension where the mask is applied.
    """

    kind: str
    factor: float = 1.0
    flat: bool = False


class Given(NamedTuple):
    """The arguments of ``AttentionCall``, as the graph has them.

    Args:
        query: as ``AttentionCall`` says.
        key: so, too.
        value: so, too.
        masks: what hides keys or is added to the logits.
        scales: further factors or divisors of the logits.
        dropout: that of the weights, as ``dropout_of`` returns it; None for none.
        leading: batch and heads, where one of the tensors has them as one dimension.
        repeats: how many heads of the query share one of key, and one of value; () where each has
            its own.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    masks: tuple[Tensor, ...]
    scales: tuple[Any, ...]
    dropout: Any
    leading: tuple[int, ...]
    repeats: tuple[int, ...]


@dataclass(frozen=True)
class AttentionCall(Call):
    """Attention with masks and scales as the graph applies them.

    Args:
        scale: the factor of the logits that is known.
        scales: "mul" or "div" for each further one, which is an argument.
        masks: the masks, which are arguments.
        dim: the dimension of the softmax.
        casts: whether the graph casts something.
        transposed: whether the key is given as [..., head_dim, length].
        orders: the permutations that bring query, key, value and the result to their places.
        rank: the number of dimensions that ``orders`` and ``dim`` need; 0 for any.
        with_weights: whether the result is a tuple, with the weights as its second part.
        flat: whether query and key, and whether value and result have batch and heads as one
            dimension, which is two where a mask is applied.
    """

    scale: float
    scales: tuple[str, ...]
    masks: tuple[Mask, ...]
    dim: int
    casts: bool
    transposed: bool
    orders: tuple[Order, Order, Order, Order]
    rank: int
    with_weights: bool
    flat: tuple[bool, bool] = (False, False)

    def fits(self, *args: Any) -> bool:
        given = self._with_heads(Given(*args))
        if given is None:
            return False
        query, key, value = given[:3]
        if not are_plain(query, key, value) or (self.casts and is_autocast(query)):
            return False
        p, rank = probability(given.dropout), query.ndim
        if p is None or not rank == key.ndim == value.ndim or rank not in (3, 4):
            return False
        if self.dim not in (-1, rank - 1) or self.rank not in (0, rank):
            return False
        if self.with_weights and not self._may_wait(query, p):
            return False
        query, key, value = self._in_place(query, key, value)
        shapes_fit = query.shape[-1] <= MAX_DIM and value.shape[-1] <= MAX_DIM
        if rank == 3:
            shapes_fit = shapes_fit and query.shape[0] == key.shape[0] == value.shape[0]
        shared = key.shape[:-2]
        if given.repeats:
            if not _are_shared(given.repeats, query, key, value):
                return False
            shared = query.shape[:-2]
        logits = (*_broadcast(query.shape[:-2], shared), query.shape[-2], key.shape[-2])
        return (
            shapes_fit
            and all(_fits_scale(s) for s in given.scales)
            and all(
                _fits_mask(kind, m, query, logits)
                for kind, m in zip(self.masks, given.masks, strict=True)
            )
        )

    def _may_wait(self, query: Tensor, p: float) -> bool:
        """Return True if the weights may be computed later, if at all."""
        one_dtype = not self.casts or query.dtype == torch.float32
        return not p and one_dtype and not torch.compiler.is_compiling()

    def _in_place(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments as [..., length, head_dim]."""
        key = key.transpose(-2, -1) if self.transposed else key
        orders = zip((query, key, value), self.orders, strict=False)
        return tuple(t if order is None else t.permute(order) for t, order in orders)

    def _with_heads(self, given: Given) -> Given | None:
        """Return the arguments with batch and heads as two dimensions; None if they are not."""
        if not given.leading:
            return given
        of_query, of_value = self.flat
        flat = [given.query, given.key] * of_query + [given.value] * of_value
        leading = _known(given.leading, flat[0].shape[0])
        masks = tuple(zip(self.masks, given.masks, strict=True))
        flat += [m for mask, m in masks if mask.flat]
        if any(t.ndim != 3 or t.shape[0] not in (1, math.prod(leading)) for t in flat):
            return None

        def two(t: Tensor, is_flat: bool) -> Tensor:
            if not is_flat:
                return t
            return t.unsqueeze(0) if t.shape[0] == 1 else t.unflatten(0, leading)

        return given._replace(
            query=two(given.query, of_query),
            key=two(given.key, of_query),
            value=two(given.value, of_value),
            masks=tuple(two(m, mask.flat) for mask, m in masks),
        )

    def __call__(self, *args: Any) -> Any:
        given = self._with_heads(Given(*args))
        assert given is not None
        query, key, value = given[:3]
        query, key, value = self._in_place(query, key, value)
        scale = self.scale
        for how, s in zip(self.scales, given.scales, strict=True):
            if not isinstance(s, Tensor):
                scale = scale * s if how == "mul" else scale / s
            else:
                query = (query * s if how == "mul" else query / s).to(query.dtype)
        mask = _combined(self.masks, given.masks)
        p = probability(given.dropout) or 0.0
        gqa = bool(given.repeats)
        out = scaled_dot_product_attention(query, key, value, mask, p, False, scale, gqa)
        assert isinstance(out, Tensor)
        order = self.orders[3]
        out = out if order is None else out.permute(order)
        out = out.flatten(0, 1) if self.flat[1] else out
        if not self.with_weights:
            return out
        return out, lazy_weights(query, key, mask, scale)


def _are_shared(repeats: tuple[int, ...], query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if that many heads of ``query`` share each one of ``key`` and ``value``."""
    if not all(isinstance(n, (int, torch.SymInt)) and n > 0 for n in repeats):
        return False
    of_query = query.shape[:2]
    given = zip((key, value), repeats, strict=True)
    return all(of_query == (t.shape[0], t.shape[1] * n) for t, n in given)


def _known(leading: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return batch and heads, of which one may be given as -1, for ``count`` of both together."""
    if -1 not in leading:
        return leading
    others = -math.prod(leading)
    return tuple(count // others if n == -1 else n for n in leading)


def _broadcast(a: torch.Size, b: torch.Size) -> tuple[int, ...]:
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


def _fits_scale(scale: Any) -> bool:
    """Return True if ``scale`` is a number, or one for each row of the query or more of them."""
    if not isinstance(scale, Tensor):
        return isinstance(scale, (int, float, torch.SymInt, torch.SymFloat))
    return scale.is_floating_point() and all(n == 1 for n in scale.shape[-2:]) and scale.ndim <= 4


def _fits_mask(mask: Mask, given: Any, query: Tensor, logits: tuple[int, ...]) -> bool:
    """Return True if a mask broadcasts to the logits, and has a dtype that its kind asks for."""
    if not broadcasts(given, query, logits):
        return False
    if mask.kind in ("hide", "show"):
        return given.dtype == torch.bool
    return mask.kind != "add" or given.dtype in KERNEL_DTYPES


def _combined(masks: tuple[Mask, ...], given: tuple[Tensor, ...]) -> Tensor | None:
    """Return all masks as one: bool, True where a key is seen, or to be added."""
    seen: Tensor | None = None
    added: Tensor | None = None
    for mask, m in zip(masks, given, strict=True):
        if mask.kind == "add":
            m = m if mask.factor == 1 else m * mask.factor
            added = m if added is None else added + m
        else:
            shown = m if mask.kind == "show" else m != 0 if mask.kind == "zero" else ~m
            seen = shown if seen is None else seen & shown
    if added is None or seen is None:
        return seen if added is None else added
    return torch.where(seen, added, -math.inf)
