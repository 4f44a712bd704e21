"""Linear layers and attention with int8 weights."""

from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.attention import MultiheadAttention, project_in
from llmos_kernels.nn.hooks import has_hooks
from llmos_kernels.ops.int8 import MAX_INNER, int8_quantize
from llmos_kernels.ops.int8_linear import (
    MODES,
    check_threshold,
    dense,
    int8_linear,
    int8_vnni_weight,
)


class Int8Linear(nn.Linear):
    """``torch.nn.Linear`` with a frozen int8 weight, through ``llmos_kernels.int8_linear``.

    Buffers ``weight_int8`` [out, in] and ``weight_scale`` [out], float32 whatever the module is cast
    to; ``bias`` is a parameter as in torch. ``weight`` is computed from them at each look, in the dtype
    that the module was made in or cast to. Input and bias get gradients. ``mode`` and
    ``outlier_threshold`` as for ``int8_linear``.

    On CPUs that pack weights a packed copy is kept beside, made anew when ``weight_int8`` is replaced
    or written to; what is written through ``.data`` goes unseen. Compiled graphs pack at each call.
    """

    weight_int8: Tensor
    weight_scale: Tensor
    mode: str
    outlier_threshold: float
    _dtype: Tensor
    _vnni_weight: Tensor | None
    _vnni_source: tuple[Tensor, tuple] | None  # Which weight, and what it was like.

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "dynamic",
        outlier_threshold: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        become_int8(self, empty_rows(self.weight), mode, outlier_threshold)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mode: str = "dynamic", outlier_threshold: float = 0.0
    ) -> "Int8Linear":
        """A new layer with the weight of ``linear`` in int8, and its bias. Raises ValueError for a
        weight that is not finite.
        """
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, linear.bias is not None)
        made.bias = linear.bias
        _set(made, quantized_rows(linear.weight), linear.weight.dtype, mode, outlier_threshold)
        return made.train(linear.training)

    @property
    def weight(self) -> Tensor:
        return dense(self.weight_int8, self.weight_scale, self._dtype.dtype)

    @weight.setter
    def weight(self, value) -> None:
        raise AttributeError("the weight of Int8Linear is weight_int8 and weight_scale")

    def forward(self, input: Tensor) -> Tensor:
        return self.activated(input, None)

    def activated(self, input: Tensor, activation: str | None) -> Tensor:
        """``activation`` of the layer's result, in the same pass."""
        weight = self.weight_int8
        return int8_linear(
            input, weight, self.weight_scale, self.bias, activation, self.outlier_threshold,
            mode=self.mode, vnni_weight=self._vnni_copy(weight),
        )  # fmt: skip

    def part(self, input: Tensor, begin: int, end: int) -> Tensor:
        """Columns [begin, end) of the layer's result."""
        rows = slice(begin, end)
        return int8_linear(
            input, self.weight_int8[rows], self.weight_scale[rows],
            None if self.bias is None else self.bias[rows], None, self.outlier_threshold,
            mode=self.mode,
        )  # fmt: skip

    def extra_repr(self) -> str:
        shown = f", outlier_threshold={self.outlier_threshold}" if self.outlier_threshold else ""
        return f"{super().extra_repr()}, mode={self.mode!r}{shown}"

    def _vnni_copy(self, w: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling():  # A graph would keep what is packed now.
            return None
        if self.mode != "dynamic" or w.device.type != "cpu" or w.is_inference():
            return None
        # The tensor is held: the address of one that is gone may come again.
        now, of = (w._version, w.data_ptr(), w.stride()), self._vnni_source
        if of is None or of[0] is not w or of[1] != now:
            self._vnni_weight, self._vnni_source = int8_vnni_weight(w), (w, now)
        return self._vnni_weight

    def _apply(self, fn, recurse=True):
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        self._vnni_weight = self._vnni_source = None
        return self

    def __getstate__(self):
        return self.__dict__ | {"_vnni_weight": None, "_vnni_source": None}


def quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and scales of a weight [out, in]. Raises ValueError where it is not finite, or has more
    columns than sums of int8 products may.
    """
    if weight.shape[1] > MAX_INNER:
        raise ValueError(f"a weight of {weight.shape[1]} columns, at most {MAX_INNER} can be int8")
    rows, scale = int8_quantize(weight)
    if not scale.isfinite().all():
        bad = scale.isfinite().logical_not().nonzero()[0].item()
        raise ValueError(f"a weight that is not finite, first in row {bad}")
    return rows, scale


def empty_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros where ``quantized_rows`` has values."""
    scale = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
    return torch.zeros_like(weight, dtype=torch.int8), scale


def become_int8(layer: Any, weights: tuple[Tensor, Tensor], mode: str, threshold: float) -> None:
    """Make an ``Int8Linear`` of the linear ``layer``, in place, with these rows [out, in] and scales."""
    dtype = layer.weight.dtype
    layer.out_features, layer.in_features = weights[0].shape
    del layer._parameters["weight"]
    layer.__class__ = Int8Linear
    _set(layer, weights, dtype, mode, threshold)


def _set(layer: Any, weights, dtype: torch.dtype, mode: str, threshold: float) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    layer.mode = mode
    layer.outlier_threshold = check_threshold(threshold) if mode == "dynamic" else 0.0
    rows, scale = weights
    layer.register_buffer("weight_int8", rows)
    layer.register_buffer("weight_scale", scale)
    layer.register_buffer("_dtype", scale.new_empty(0, dtype=dtype), persistent=False)
    layer._vnni_weight = layer._vnni_source = None


def activated(layer: nn.Module, input: Tensor, activation: str | None) -> Tensor | None:
    """``activation`` of what an ``Int8Linear`` makes of ``input``; None for other layers."""
    if type(layer) is not Int8Linear or has_hooks(layer):
        return None
    return layer.activated(input, activation)


class Int8MultiheadAttention(MultiheadAttention):
    """``MultiheadAttention`` whose projections are ``Int8Linear``: ``in_proj``, of query, key and value
    one after the other, and ``out_proj``. ``in_proj_weight`` is computed from them at each look.
    """

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        return self.in_proj.weight  # type: ignore[union-attr, return-value]

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        return self.in_proj.bias  # type: ignore[union-attr, return-value]

    def _project(self, query, key, value) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return project_in(self, query).split(self.embed_dim, -1)
        e, layer = self.embed_dim, self.in_proj
        if key is value:
            both = layer.part(key, e, 3 * e)  # type: ignore[operator, union-attr]
            return layer.part(query, 0, e), *both.split(e, -1)  # type: ignore[operator, union-attr]
        given = enumerate((query, key, value))
        return tuple(layer.part(x, i * e, (i + 1) * e) for i, x in given)  # type: ignore


def attention_becomes_int8(attention: Any, weights: list, mode: str, threshold: float) -> None:
    """Make an ``Int8MultiheadAttention`` of ``attention``, in place. ``weights``: rows and scales of its
    in_proj and of its out_proj.
    """
    e = attention.embed_dim
    with torch.device("meta"):
        layer = nn.Linear(e, 3 * e, bias=False)
    layer.to(attention.in_proj_weight.dtype)
    layer.bias = attention._parameters.pop("in_proj_bias")
    become_int8(layer, weights[0], mode, threshold)
    del attention._parameters["in_proj_weight"]
    attention.__class__ = Int8MultiheadAttention
    attention.in_proj = layer.train(attention.training)
    become_int8(attention.out_proj, weights[1], mode, threshold)
