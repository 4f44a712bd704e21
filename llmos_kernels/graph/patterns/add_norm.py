"""Layer normalization of a sum, of which one operand may be dropped."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmos_kernels.graph.patterns.pattern import (
    Pattern,
    dropout_of,
    is_node,
    norm_of,
    norm_parameters,
    probability,
)
from llmos_kernels.graph.reader import Reader
from llmos_kernels.graph.site import Call, Found, are_plain
from llmos_kernels.graph.vocabulary import Op
from llmos_kernels.ops.layer_norm import add_layer_norm


@dataclass(frozen=True)
class AddNormCall(Call):
    """``h = residual + dropout(x)`` and ``layer_norm(h)``.

    Args:
        with_sum: whether the result is a tuple, with h as its second part.
    """

    with_sum: bool

    def fits(self, x: Tensor, residual: Tensor, norm: Any, dropout: Any) -> bool:
        parameters = norm_parameters(norm)
        if parameters is None or probability(dropout) is None:
            return False
        shape, weight, bias, _ = parameters
        given = [t for t in (weight, bias) if t is not None]
        return (
            are_plain(x, residual, *given, mixed=True)
            and x.shape == residual.shape
            and _are_of(torch.promote_types(x.dtype, residual.dtype), given)
            and tuple(x.shape[x.ndim - len(shape) :]) == tuple(shape)
        )

    def __call__(self, x: Tensor, residual: Tensor, norm: Any, dropout: Any) -> Any:
        shape, weight, bias, eps = norm_parameters(norm)  # type: ignore[misc]
        p = probability(dropout)
        y, h = add_layer_norm(x, residual, shape, weight, bias, eps, p or 0.0, bool(p))
        return (y, h) if self.with_sum else y


def _are_of(dtype: torch.dtype, parameters: list[Tensor]) -> bool:
    """Return True if kernels take a norm of this ``dtype`` with these ``parameters``."""
    dtypes = {p.dtype for p in parameters}
    return dtypes <= {dtype} or dtypes == {torch.float32}


class AddNorm(Pattern):
    """Layer norm of a sum, perhaps with dropout of one operand, perhaps with the sum used."""

    anchors: ClassVar = ("layer_norm",)

    def find(self, op: Op, reader: Reader) -> Found | None:
        total = reader.op(op.get("input"), "add")
        if not total or total.get("alpha", 1) != 1:
            return None
        x, residual = total.get("input"), total.get("other")
        if not is_node(x, residual):
            return None
        nodes, dropout = [op.node, total.node], None
        for dropped, other in ((x, residual), (residual, x)):
            found = reader.op(dropped, "dropout")
            if found and reader.is_alone(found.node):
                x, residual, dropout = found.get("input"), other, dropout_of(found)
                nodes.append(found.node)
                break
        outputs = (op.node,) if reader.is_alone(total.node) else (op.node, total.node)
        call = AddNormCall(len(outputs) == 2)
        args = x, residual, norm_of(op), dropout
        shown = f"{'dropout, ' * (dropout is not None)}add and layer norm"
        return Found(frozenset(nodes), outputs, args, call, op.node, shown)
