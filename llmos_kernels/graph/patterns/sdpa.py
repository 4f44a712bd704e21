"""Attention that torch's own function computes."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmos_kernels._core.registry import KERNEL_DTYPES
from llmos_kernels.graph.patterns.pattern import Pattern, broadcasts, is_node
from llmos_kernels.graph.reader import NoMatch, Reader
from llmos_kernels.graph.site import Call, Found, are_plain
from llmos_kernels.graph.vocabulary import Op
from llmos_kernels.ops._attention_arguments import MAX_DIM
from llmos_kernels.ops.attention import scaled_dot_product_attention


@dataclass(frozen=True)
class SdpaCall(Call):
    """``torch.nn.functional.scaled_dot_product_attention``, by our kernels."""

    enable_gqa: bool

    def fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        dropout_p: Any,
        is_causal: Any,
        scale: Any,
    ) -> bool:
        if not are_plain(query, key, value) or not query.ndim == key.ndim == value.ndim == 4:
            return False
        if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
            return False
        if not isinstance(is_causal, bool):
            return False
        if mask is not None and (is_causal or not _takes(mask, query, key)):
            return False
        shapes_fit = query.shape[-1] <= MAX_DIM and value.shape[-1] <= MAX_DIM
        return shapes_fit and (scale is None or isinstance(scale, (int, float)))

    def __call__(self, *args: Any) -> Any:
        attend: Any = scaled_dot_product_attention
        return attend(*args, self.enable_gqa)


def _takes(mask: Any, query: Tensor, key: Tensor) -> bool:
    """Return True if kernels take ``mask`` with these tensors."""
    if not broadcasts(mask, query, (*query.shape[:-1], key.shape[-2])):
        return False
    return mask.dtype == torch.bool or mask.dtype in KERNEL_DTYPES


class Sdpa(Pattern):
    """A call of ``torch.nn.functional.scaled_dot_product_attention``."""

    anchors: ClassVar = ("sdpa",)

    def find(self, op: Op, reader: Reader) -> Found | None:
        enable_gqa = op.get("enable_gqa", False)
        tensors = tuple(op.get(name) for name in ("query", "key", "value"))
        if not is_node(*tensors):
            return None
        if not isinstance(enable_gqa, bool):
            raise NoMatch("whether heads share keys depends on a size")
        options = op.get("dropout_p", 0.0), op.get("is_causal", False), op.get("scale")
        args = *tensors, op.get("attn_mask"), *options
        call = SdpaCall(enable_gqa)
        shown = "attention: scaled_dot_product_attention"
        return Found(frozenset((op.node,)), (op.node,), args, call, op.node, shown)
