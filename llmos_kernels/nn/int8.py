"""Linear layers and attention with int8 weights.

Source: LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, for the outlier columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.attention import MultiheadAttention, project_in
from llmos_kernels.nn.dense_weight import DenseWeight
from llmos_kernels.nn.fusible import is_fusible
from llmos_kernels.nn.nested import map_rows
from llmos_kernels.ops.int8 import MAX_INNER, int8_quantize
from llmos_kernels.ops.int8_linear import (
    MODES,
    check_threshold,
    dense,
    int8_linear,
)
from llmos_kernels.ops.int8_vnni_weight import int8_vnni_weight


class Int8Linear(nn.Linear):
    """``torch.nn.Linear`` with a frozen int8 weight, through ``llmos_kernels.int8_linear``.

    The buffers are ``weight_int8`` [out, in] and ``weight_scale`` [out], which is float32 whatever
    the module is cast to; ``bias`` is a parameter as in torch. ``weight`` is computed from the
    buffers each time it is read, in the dtype that the module was made in or cast to. Assigning to
    it, or to its ``data``, quantizes the new values; a write in place raises. Input and bias get
    gradients.

    On CPUs a copy of the weight in VNNI layout is stored as well. It is made again when
    ``weight_int8`` is replaced or written to; a write through ``.data`` is not noticed.
    Compiled graphs make it at each call.

    Args:
        in_features: the width of the input.
        out_features: the width of the output.
        bias: whether there is a bias.
        device: of buffers and bias.
        dtype: of ``weight`` and bias.
        mode: "dynamic" or "weight_only", see ``int8_linear``.
        outlier_threshold: for "dynamic", the magnitude from which a column of the input stays
            float; 0 turns this off.

    Returns:
        ``forward(input)`` takes [..., in_features] and returns [..., out_features].

    Raises:
        ValueError: another mode or threshold.

    Example:
        >>> layer = Int8Linear.from_linear(torch.nn.Linear(512, 2048))
        >>> layer(torch.randn(8, 512)).shape
        torch.Size([8, 2048])
    """

    weight_int8: Tensor
    weight_scale: Tensor
    mode: str
    outlier_threshold: float
    _dtype: Tensor
    #: The weight in VNNI layout; and the weight that it was made from, with the state that it had.
    _vnni_weight: Tensor | None
    _vnni_source: tuple[Tensor, tuple[Any, ...]] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
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
        """Return a new layer with the weight of ``linear`` in int8, and with its bias.

        Args:
            linear: a float layer, which stays as it is.
            mode: as for the class.
            outlier_threshold: as for the class.

        Raises:
            ValueError: the weight is not finite, or has more than 131,071 columns.
        """
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, linear.bias is not None)
        made.bias = linear.bias
        _set(made, quantized_rows(linear.weight), linear.weight.dtype, mode, outlier_threshold)
        return made.train(linear.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight [out, in], ``weight_int8 * weight_scale``."""
        if torch.compiler.is_compiling():
            return dense(self.weight_int8, self.weight_scale, self._dtype.dtype)
        with torch.inference_mode(False):  # Inference tensors do not count the writes to them.
            values = dense(self.weight_int8, self.weight_scale, self._dtype.dtype)
            return DenseWeight.of(self, values)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "weight_int8" in self._buffers:
            self.write_weight(value)
        else:
            super().__setattr__(name, value)

    def write_weight(self, value: Tensor) -> None:
        """Quantize ``value`` and compute with it from now on.

        Args:
            value: a float weight [out, in].

        Raises:
            TypeError: it is no tensor.
            ValueError: it has another shape, or is not finite. The layer is unchanged.
        """
        if not isinstance(value, Tensor):
            raise TypeError(f"a weight must be a tensor, got {type(value).__name__}")
        if value.shape != self.weight_int8.shape:
            raise ValueError(f"a weight of {[*self.weight_int8.shape]}, got {[*value.shape]}")
        with torch.no_grad():
            rows, scale = quantized_rows(value.detach())
            self.weight_int8.copy_(rows)
            self.weight_scale.copy_(scale)

    def forward(self, input: Tensor) -> Tensor:
        return self.activated(input, None)

    def activated(self, input: Tensor, activation: str | None) -> Tensor:
        """Return ``activation`` of the layer's result, computed in the epilogue of its GEMM."""
        if input.is_nested:
            return map_rows(input, lambda rows: self.activated(rows, activation))
        weight = self.weight_int8
        return int8_linear(
            input,
            weight,
            self.weight_scale,
            self.bias,
            activation,
            self.outlier_threshold,
            mode=self.mode,
            vnni_weight=self._current_vnni_weight(weight),
        )

    def part(self, input: Tensor, begin: int, end: int) -> Tensor:
        """Return the columns [begin, end) of the layer's result."""
        rows = slice(begin, end)
        return int8_linear(
            input,
            self.weight_int8[rows],
            self.weight_scale[rows],
            None if self.bias is None else self.bias[rows],
            None,
            self.outlier_threshold,
            mode=self.mode,
        )

    def extra_repr(self) -> str:
        shown = f", outlier_threshold={self.outlier_threshold}" if self.outlier_threshold else ""
        return f"{super().extra_repr()}, mode={self.mode!r}{shown}"

    def _current_vnni_weight(self, weight: Tensor) -> Tensor | None:
        """Return ``weight`` in VNNI layout.

        None where the layout is not needed, and where a later change of ``weight`` would go
        unnoticed.
        """
        if torch.compiler.is_compiling():  # A graph would store the copy that is made now.
            return None
        if self.mode != "dynamic" or weight.device.type != "cpu" or weight.is_inference():
            return None
        # The source is held, so that no other tensor can get its address.
        state, source = (weight._version, weight.data_ptr(), weight.stride()), self._vnni_source
        if source is None or source[0] is not weight or source[1] != state:
            self._vnni_weight, self._vnni_source = int8_vnni_weight(weight), (weight, state)
        return self._vnni_weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        self._vnni_weight = self._vnni_source = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_vnni_weight": None, "_vnni_source": None}


def quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight [out, in] as int8 rows [out, in] and float32 scales [out].

    Raises:
        ValueError: the weight is not finite, or has more columns than an int32 sum of int8 products
            can have terms.
    """
    if weight.shape[1] > MAX_INNER:
        raise ValueError(f"a weight of {weight.shape[1]} columns, at most {MAX_INNER} can be int8")
    rows, scale = int8_quantize(weight)
    if not scale.isfinite().all():
        row = scale.isfinite().logical_not().nonzero()[0].item()
        raise ValueError(f"a weight that is not finite, first in row {row}")
    return rows, scale


def empty_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return zeros in the shapes and dtypes of ``quantized_rows(weight)``."""
    scale = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
    return torch.zeros_like(weight, dtype=torch.int8), scale


def become_int8(layer: Any, weights: tuple[Tensor, Tensor], mode: str, threshold: float) -> None:
    """Turn a linear layer into an ``Int8Linear``, in place.

    Args:
        layer: a linear layer with a parameter ``weight``, or a ``Conv1D`` of transformers.
        weights: int8 rows [out, in] and scales [out].
        mode: as for ``Int8Linear``.
        threshold: its outlier threshold.

    Raises:
        ValueError: another mode or threshold.
    """
    dtype = layer.weight.dtype
    layer.out_features, layer.in_features = weights[0].shape
    del layer._parameters["weight"]
    layer.__class__ = Int8Linear
    _set(layer, weights, dtype, mode, threshold)


def _set(
    layer: Any, weights: tuple[Tensor, Tensor], dtype: torch.dtype, mode: str, threshold: float
) -> None:
    """Give an ``Int8Linear`` its buffers and options."""
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
    """Return ``activation`` of what an ``Int8Linear`` makes of ``input``; None for other layers."""
    if type(layer) is not Int8Linear or not is_fusible(layer):
        return None
    return layer.activated(input, activation)


class Int8MultiheadAttention(MultiheadAttention):
    """``MultiheadAttention`` with int8 projections, which ``quantize`` makes of a float module.

    ``in_proj`` is an ``Int8Linear`` [3 * embed_dim, embed_dim] with the rows of query, key and
    value one after the other, ``out_proj`` is another. ``in_proj_weight`` is computed each time it
    is read.

    Args:
        *args, **kwargs: those of ``MultiheadAttention``. Nobody passes them here: ``quantize``
            changes the class of a module that exists.

    Returns:
        ``forward`` takes and returns what that of ``MultiheadAttention`` does, in the dtype of the
        float module: [batch, length, embed_dim] if ``batch_first``, and the weights or None.

    Raises:
        AssertionError, RuntimeError: where torch raises them: shapes disagree.
        ValueError: the head dim is above 256 or, in training, ``dropout`` is outside [0, 1).
        TypeError: the dtype of an input is not that of the biases.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(512, 8, batch_first=True)
        >>> report = llmos_kernels.quantize(layer, always=True)
        >>> type(layer.self_attn).__name__
        'Int8MultiheadAttention'

    Source: LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, for the outlier columns.
    """

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """The float weight [3 * embed_dim, embed_dim], written as that of ``Int8Linear`` is."""
        return self.in_proj.weight  # type: ignore[union-attr, return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "in_proj_weight" and "in_proj" in self._modules:
            self.in_proj.weight = value  # type: ignore[union-attr]
        else:
            super().__setattr__(name, value)

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """The bias [3 * embed_dim]."""
        return self.in_proj.bias  # type: ignore[union-attr, return-value]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return project_in(self, query).split(self.embed_dim, -1)
        e, layer = self.embed_dim, self.in_proj
        if key is value:
            keys_values = layer.part(key, e, 3 * e)  # type: ignore[operator, union-attr]
            return layer.part(query, 0, e), *keys_values.split(e, -1)  # type: ignore
        given = enumerate((query, key, value))
        return tuple(layer.part(x, i * e, (i + 1) * e) for i, x in given)  # type: ignore


def attention_becomes_int8(
    attention: Any, weights: list[tuple[Tensor, Tensor]], mode: str, threshold: float
) -> None:
    """Turn a multi-head attention into an ``Int8MultiheadAttention``, in place.

    Args:
        attention: a ``MultiheadAttention``, torch's or ours, with one ``in_proj_weight``.
        weights: int8 rows and scales of ``in_proj_weight`` and of ``out_proj``.
        mode: as for ``Int8Linear``.
        threshold: its outlier threshold.
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
