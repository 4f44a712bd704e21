"""Linear layers with an int8 weight.

    dynamic:      z = (sum_k q_ik w_jk * x_scale_i + sum_o x_io w_jo) * w_scale_j + bias_j
    weight_only:  z = sum_k x_ik w_jk * w_scale_j + bias_j
    y = activation(z)

In "dynamic" mode the input's rows are quantized to int8, q, at each call (``int8_quantize``), but
for the outliers o: the columns in which any row has a magnitude of ``outlier_threshold`` or more.
These are 0 in q, do not count for the scale, and are multiplied unquantized, in float32, by the
int8 weight. LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) is similar, but keeps the weights
of these columns in float16. NaN is no outlier.

The gradient of the input is that of a linear layer with the weight ``weight_int8 * weight_scale``:
the gradient of the rounding is taken as 1 (a straight-through estimator). The weight has no
gradient.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llmos_kernels._core.registry import (
    KERNEL_DTYPES,
    define,
    define_composite,
    needs_grad,
    use_reference,
)
from llmos_kernels.ops import _activations, _products
from llmos_kernels.ops._activations import NONE
from llmos_kernels.ops._autocast import autocast
from llmos_kernels.ops.int8 import (
    check_beside,
    check_int8,
    check_shapes,
    matmul_reference,
    quantize_reference,
    vnni_shape,
)
from llmos_kernels.ops.linear import Activation, as_rows, linear

__all__ = ["int8_linear", "int8_linear_reference"]

MODES = ("dynamic", "weight_only")
#: The most rows of input that the kernel for ``weight_only`` takes.
WEIGHT_ONLY_ROWS = 16


def check_threshold(outlier_threshold: float) -> float:
    """Return the threshold as a float, or raise ValueError if it is negative or not finite."""
    threshold = float(outlier_threshold)
    if not 0 <= threshold < math.inf:
        raise ValueError(f"outlier_threshold must be 0 or more and finite, got {threshold}")
    return threshold


def _outliers(rows: Tensor, threshold: float) -> Tensor | None:
    """Return which columns [in] of ``rows`` hold an outlier, bool; None for threshold 0."""
    return (rows.float().abs() >= threshold).any(0) if threshold else None


def dynamic_reference(
    input: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    vnni_weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    threshold: float,
) -> Tensor:
    """Return the layer of mode "dynamic": the op where no kernel is registered."""
    rows: Tensor = input
    outlier_sums: Tensor | float = 0
    columns = _outliers(input, threshold)
    if columns is not None:
        rows = input.where(~columns, 0)
        outlier_sums = input[:, columns].float() @ weight_int8[:, columns].float().mT
    a, a_scale = quantize_reference(rows)
    return matmul_reference(
        a,
        weight_int8,
        a_scale,
        weight_scale,
        vnni_weight,
        bias,
        activation,
        input.dtype,
        outlier_sums,
    )


def _weight_only_reference(
    input: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: int,
) -> Tensor:
    z = (input.float() @ weight_int8.float().mT) * weight_scale
    if bias is not None:
        z = z + bias.float()
    return _products.activate_rows(z.to(input.dtype), activation, 0.0, None).contiguous()


def _out(input: Tensor, weight_int8: Tensor, *_: Any) -> Tensor:
    return input.new_empty(input.shape[0], weight_int8.shape[0])


WEIGHT = "Tensor input, Tensor weight_int8, Tensor weight_scale"

_dynamic = define(
    f"int8_linear({WEIGHT}, Tensor? vnni_weight, Tensor? bias, int activation,"
    " float outlier_threshold) -> Tensor",
    reference=dynamic_reference,
    fake=_out,
    triton="int8.linear:linear",
    flops=_products.flops_of_rows,
)

_weight_only = define(
    f"int8_weight_only({WEIGHT}, Tensor? bias, int activation) -> Tensor",
    reference=_weight_only_reference,
    fake=_out,
    triton="int8.linear:weight_only",
    flops=_products.flops_of_rows,
)


def _differentiable_reference(
    rows: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: int,
    threshold: float,
    mode: str,
) -> Tensor:
    """Return the layer by differentiable torch ops; the gradient of the rounding is taken as 1."""
    acc = torch.promote_types(rows.dtype, torch.float32)
    x = rows.to(acc)
    if mode == "dynamic":
        columns, values = _outliers(rows.detach(), threshold), rows.detach()
        if columns is not None:
            values = values.where(~columns, 0)
        quantized, scale = quantize_reference(values)
        rounded = quantized.to(acc) * scale.to(acc)[:, None]
        if columns is not None:
            rounded = x.detach().where(columns, rounded)
        x = rounded + (x - x.detach()).where(x.detach().isfinite(), 0)
    z = x @ (weight_int8.to(acc) * weight_scale.to(acc)[:, None]).mT
    if bias is not None:
        z = z + bias.to(acc)
    return _products.activate_rows(z.to(rows.dtype), activation, 0.0, None)


def dense(weight_int8: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] as floats of ``dtype``."""
    return (weight_int8 * weight_scale[:, None]).to(dtype)


def _weight_only_by_rows(
    rows: Tensor, weight_int8: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: int
) -> Tensor:
    """Return the "weight_only" layer: by its kernel for few rows, else with a float weight."""
    if _products.is_traced(rows):
        return _weight_only_of_any_rows(rows, weight_int8, weight_scale, bias, activation)
    if rows.shape[0] <= WEIGHT_ONLY_ROWS:
        return _weight_only(rows, weight_int8, weight_scale, bias, activation)
    weight = dense(weight_int8, weight_scale, rows.dtype)
    return linear(rows, weight, bias, _activations.NAMES[activation])


#: A traced graph records this op in place of the branch above: the branch compares the number of
#: rows, which may be symbolic while tracing, so it is taken when the op runs.
_weight_only_of_any_rows = define_composite(
    f"int8_weight_only_of_any_rows({WEIGHT}, Tensor? bias, int activation) -> Tensor",
    run=_weight_only_by_rows,
    fake=_out,
    flops=_products.flops_of_rows,
)


def _linear(
    rows: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    vnni_weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    threshold: float,
    mode: str,
) -> Tensor:
    if mode == "dynamic":
        args = rows, weight_int8, weight_scale, vnni_weight, bias, activation, threshold
        return _dynamic(*args)
    return _weight_only_by_rows(rows, weight_int8, weight_scale, bias, activation)


class _Int8Linear(torch.autograd.Function):
    """The layer without its activation. Its gradients need the int8 weight alone."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight_int8: Tensor,
        weight_scale: Tensor,
        vnni_weight: Tensor | None,
        bias: Tensor | None,
        threshold: float,
        mode: str,
    ) -> Tensor:
        ctx.save_for_backward(weight_int8, weight_scale)
        return _linear(rows, weight_int8, weight_scale, vnni_weight, bias, NONE, threshold, mode)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        weight_int8, weight_scale = ctx.saved_tensors
        dinput = None
        if ctx.needs_input_grad[0]:
            dinput = dz @ dense(weight_int8, weight_scale, dz.dtype)
        dbias = _products.sum_of_rows(dz) if ctx.needs_input_grad[4] else None
        return dinput, None, None, None, dbias, None, None


def int8_linear(
    input: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    outlier_threshold: float = 0.0,
    *,
    mode: str = "dynamic",
    vnni_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return a linear layer with an int8 weight and its activation.

    Args:
        input: [..., in], float32, bfloat16 or float16 (float64: the reference computes it, and
            quantizes in float32), any strides.
        weight_int8: [out, in], int8, as ``int8_quantize`` makes it.
        weight_scale: [out], float32, as ``int8_quantize`` makes it.
        bias: [out], of the dtype of ``input``, or None.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh" or "silu".
        outlier_threshold: Columns of ``input`` (over all rows) with a magnitude of this or more are
            not quantized; 0 means none. For mode "dynamic" alone.
        mode: "dynamic" quantizes the rows of ``input``. "weight_only" does not: up to 16 rows are
            computed by one kernel that reads the int8 weight, more with a float copy of it.
        vnni_weight: ``int8_vnni_weight(weight_int8)``, or None.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        [..., out], of the dtype of ``input``. Gradients reach ``input`` and ``bias``. Under
        autocast these two are cast to its dtype first.

    Raises:
        ValueError: Shapes or devices disagree, a name is unknown, the threshold is negative or not
            finite, or ``in`` is above 131,071.
        TypeError: A dtype is not as above.

    Example:
        >>> weight, scale = int8_quantize(torch.randn(512, 768))
        >>> int8_linear(torch.randn(4, 768), weight, scale, activation="gelu").shape
        torch.Size([4, 512])

    Outliers as in Dettmers et al. 2022, arXiv:2208.07339.
    """
    code = _activations.code_of(activation)
    threshold = check_threshold(outlier_threshold)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if threshold and mode != "dynamic":
        raise ValueError(f"outlier_threshold is for mode 'dynamic', got {threshold} with {mode!r}")
    input, bias = autocast(input, bias)
    check_int8_linear(input, weight_int8, weight_scale, bias, vnni_weight)
    rows = as_rows(input)
    quantization = code, threshold, mode
    if use_reference(backend, input.dtype):
        out = _differentiable_reference(rows, weight_int8, weight_scale, bias, *quantization)
    elif needs_grad(input, bias):
        out = _Int8Linear.apply(rows, weight_int8, weight_scale, vnni_weight, bias, threshold, mode)
        out = out if code == NONE else Activation.apply(out, code, 0.0, None)
    else:
        out = _linear(rows, weight_int8, weight_scale, vnni_weight, bias, *quantization)
    return out.view(*input.shape[:-1], weight_int8.shape[0])


def check_int8_linear(
    input: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    vnni_weight: Tensor | None,
) -> None:
    """Raise ValueError or TypeError where the arguments of ``int8_linear`` disagree."""
    if input.is_nested:
        raise ValueError(
            "input must not be a nested tensor: pad it, or optimize the layer around this one"
        )
    if input.dtype not in KERNEL_DTYPES and input.dtype != torch.float64:
        raise TypeError(f"input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    check_int8(weight_int8=weight_int8)
    check_shapes(input, weight_int8, ("input", "weight_int8"))
    outputs = weight_int8.shape[0]
    check_beside(
        input,
        weight_int8=(weight_int8, weight_int8.shape, torch.int8),
        weight_scale=(weight_scale, (outputs,), torch.float32),
        bias=(bias, (outputs,), input.dtype),
        vnni_weight=(vnni_weight, vnni_shape(weight_int8), torch.int8),
    )


def int8_linear_reference(*args: Any, **options: Any) -> Tensor:
    """Return ``int8_linear`` by its definition, in plain, differentiable torch ops.

    It runs on any device. The gradient of the rounding is taken as 1.

    Args:
        *args: as ``int8_linear``, without ``backend``.
        **options: as ``int8_linear``, without ``backend``.

    Returns:
        [..., out], of the dtype of ``input``.
    """
    return int8_linear(*args, **options, backend="reference")
