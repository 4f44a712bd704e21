"""Linear layers with an int8 weight.

    dynamic:      y = activation((sum_k q_ik w_jk * x_scale_i + sum_o x_io w_jo) * w_scale_j + bias_j)
    weight_only:  y = activation(sum_k x_ik w_jk * w_scale_j + bias_j)

In "dynamic" mode rows of the input become int8, q, as they come (``int8_quantize``), but for the outliers
o: the columns in which a magnitude reaches ``outlier_threshold`` in any row. These are 0 in q, do not
count for the scale, and are multiplied as they are, in float32, as LLM.int8() does (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339). NaN reaches no threshold.

The gradient is that of a linear layer with the weight ``weight_int8 * weight_scale``: rounding passes
gradients through, the weight has none.
"""

import math
import sys

import torch
from torch import Tensor

from llmos_kernels._registry import KERNEL_DTYPES, define, needs_grad, use_reference
from llmos_kernels.ops import _activations, _products
from llmos_kernels.ops._activations import NONE, RELU, RELU2
from llmos_kernels.ops._autocast import autocast
from llmos_kernels.ops.int8 import (
    STRIP,
    UNIT,
    check_beside,
    check_int8,
    check_shapes,
    matmul_reference,
    packed_shape,
    quantize_reference,
)
from llmos_kernels.ops.linear import as_rows, linear

MODES = ("dynamic", "weight_only")
#: Rows of input that a kernel multiplies with an int8 weight without making them int8.
WEIGHT_ONLY_ROWS = 16
#: Activations without negative results.
_POSITIVE = RELU, RELU2


def check_threshold(outlier_threshold: float) -> float:
    """It as a float, or ValueError where it is negative or not finite."""
    threshold = float(outlier_threshold)
    if not 0 <= threshold < math.inf:
        raise ValueError(f"outlier_threshold must be 0 or more and finite, got {threshold}")
    return threshold


def _outliers(rows: Tensor, threshold: float) -> Tensor | None:
    """[in], bool: the columns that stay as they are; None where none is asked for."""
    return (rows.float().abs() >= threshold).any(0) if threshold else None


def _linear_reference(input, weight_int8, weight_scale, packed, bias, activation, threshold):
    columns, more = _outliers(input, threshold), 0
    rows = input if columns is None else input.where(~columns, 0)
    if columns is not None:
        more = input[:, columns].float() @ weight_int8[:, columns].float().mT
    a, a_scale = quantize_reference(rows)
    return matmul_reference(
        a, weight_int8, a_scale, weight_scale, packed, bias, activation, input.dtype, more
    )


def _linear_rows_reference(input, weight_int8, weight_scale, packed, bias, activation):
    y = _linear_reference(input, weight_int8, weight_scale, packed, bias, activation, 0.0)
    return quantize_reference(y, activation in _POSITIVE)


def _linear_rows_fake(input, weight_int8, weight_scale, packed, bias, activation):
    dtype = torch.uint8 if activation in _POSITIVE else torch.int8
    rows = input.new_empty(input.shape[0], weight_int8.shape[0], dtype=dtype)
    return rows, input.new_empty(input.shape[0], dtype=torch.float32)


def _weight_only_reference(input, weight_int8, weight_scale, bias, activation):
    z = (input.float() @ weight_int8.float().mT) * weight_scale
    if bias is not None:
        z = z + bias.float()
    return _products.activate_rows(z.to(input.dtype), activation, 0.0, None).contiguous()


def _pack_reference(weight_int8):
    (outer, inner), (strips, units, *_) = weight_int8.shape, packed_shape(weight_int8)
    packed = weight_int8.new_zeros(strips * STRIP, units * UNIT)
    packed[:outer, :inner] = weight_int8
    # The instruction takes it as uint8: 128 more, which turns the highest bit.
    return (packed ^ -128).view(strips, STRIP, units, UNIT).transpose(1, 2).contiguous()


def _out(input, weight_int8, *_):
    return input.new_empty(input.shape[0], weight_int8.shape[0])


_dynamic = define(
    "int8_linear(Tensor input, Tensor weight_int8, Tensor weight_scale, Tensor? packed, Tensor? bias,"
    " int activation, float outlier_threshold) -> Tensor",
    reference=_linear_reference,
    fake=_out,
    triton="int8:linear",
)
_linear_rows = define(
    "int8_linear_rows(Tensor input, Tensor weight_int8, Tensor weight_scale, Tensor? packed,"
    " Tensor? bias, int activation) -> (Tensor rows, Tensor scale)",
    reference=_linear_rows_reference,
    fake=_linear_rows_fake,
    triton="int8:linear_rows",
)
_weight_only = define(
    "int8_weight_only(Tensor input, Tensor weight_int8, Tensor weight_scale, Tensor? bias,"
    " int activation) -> Tensor",
    reference=_weight_only_reference,
    fake=_out,
    triton="int8:weight_only",
)
_pack = define(
    "int8_pack(Tensor weight_int8) -> Tensor",
    reference=_pack_reference,
    fake=lambda weight_int8: weight_int8.new_empty(packed_shape(weight_int8)),
)


def int8_pack(weight_int8: Tensor) -> Tensor | None:
    """``weight_int8`` [out, in] as products read it on this device; None where they read it as it is.

    Opaque, of the weight's own size, and good for this process alone. Without it ``int8_linear`` packs
    the weight at each call of more than 16 rows. Raises TypeError for another dtype, ValueError for
    another number of dimensions.
    """
    check_int8(weight_int8=weight_int8)
    if weight_int8.ndim != 2:
        raise ValueError(f"weight_int8 must be [out, in], got {list(weight_int8.shape)}")
    extension = sys.modules.get("llmos_kernels._C")
    if weight_int8.device.type != "cpu" or extension is None or not extension.packs_int8():
        return None
    return _pack(weight_int8.detach())


def _definition(rows, weight_int8, weight_scale, bias, activation, threshold, mode) -> Tensor:
    """By differentiable torch ops; rounding passes derivatives through."""
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
    """The float weight that they stand for."""
    return (weight_int8 * weight_scale[:, None]).to(dtype)


def _linear(rows, weight_int8, weight_scale, packed, bias, activation, threshold, mode) -> Tensor:
    if mode == "dynamic":
        args = rows, weight_int8, weight_scale, packed, bias, activation, threshold
        return _dynamic(*args)
    if rows.shape[0] <= WEIGHT_ONLY_ROWS:
        return _weight_only(rows, weight_int8, weight_scale, bias, activation)
    weight = dense(weight_int8, weight_scale, rows.dtype)
    return linear(rows, weight, bias, _activations.NAMES[activation])


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight_int8, weight_scale, packed, bias, activation, threshold, mode):
        args = rows, weight_int8, weight_scale, packed, bias
        y = z = _linear(*args, NONE, threshold, mode)
        if activation != NONE:
            y = _products.activation_forward(z, activation, 0.0, None)
        keep = _activations.keeps_input(activation)
        kept = z if keep else y if activation == RELU else None
        # The input is for second derivatives alone.
        again = (rows, bias) if keep else (None, None)
        ctx.save_for_backward(*again, weight_int8, weight_scale, kept)
        ctx.activation, ctx.rest = activation, (NONE, threshold, mode)
        return y

    @staticmethod
    def backward(ctx, dout):
        rows, bias, weight_int8, weight_scale, kept = ctx.saved_tensors
        if kept is None:
            dz = dout
        elif torch.is_grad_enabled():
            if rows is not None:
                kept = _definition(rows, weight_int8, weight_scale, bias, *ctx.rest)
            dz = (dout * _products.slopes(kept, ctx.activation, 0.0, None)).to(dout.dtype)
        else:
            dz = _products.activation_backward(dout, kept, ctx.activation, 0.0, None)
        dinput = None
        if ctx.needs_input_grad[0]:
            dinput = dz @ dense(weight_int8, weight_scale, dz.dtype)
        dbias = _products.sum_of_rows(dz) if ctx.needs_input_grad[4] else None
        return dinput, None, None, None, dbias, None, None, None


def int8_linear(
    input: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    outlier_threshold: float = 0.0,
    *,
    mode: str = "dynamic",
    packed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with an int8 weight.

    ``input`` [..., in] and ``bias`` [out] of one dtype: float32, bfloat16 or float16, any strides
    (float64: the reference answers, which quantises in float32);
    ``weight_int8`` [out, in], int8, and ``weight_scale`` [out], float32, as ``int8_quantize`` makes
    them. ``activation`` as for ``linear``. Returns [..., out]. Gradients reach ``input`` and ``bias``.

    ``mode`` "dynamic" makes rows of the input int8 as they come; columns of it (over all rows) with a
    magnitude of ``outlier_threshold`` or more stay in the input's dtype, 0 means none. "weight_only"
    leaves the input as it is, for up to 16 rows in one kernel that reads the int8 weight; more rows are
    multiplied with the weight in their dtype. ``packed``: what ``int8_pack`` made of this very weight.

    Under autocast the floating point arguments are cast, as torch does. Raises ValueError for shapes,
    devices, names or a threshold that is not a finite number of 0 or more, and for more than 131,071
    columns, TypeError for dtypes.
    """
    code = _activations.code_of(activation)
    threshold = check_threshold(outlier_threshold)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if threshold and mode != "dynamic":
        raise ValueError(f"outlier_threshold is for mode 'dynamic', got {threshold} with {mode!r}")
    input, bias = autocast(input, bias)
    _check(input, weight_int8, weight_scale, bias, packed)
    rows = as_rows(input)
    rest = code, threshold, mode
    if use_reference(backend, input.dtype):
        out = _definition(rows, weight_int8, weight_scale, bias, *rest)
    elif needs_grad(input, bias):
        out = _Int8Linear.apply(rows, weight_int8, weight_scale, packed, bias, *rest)
    else:
        out = _linear(rows, weight_int8, weight_scale, packed, bias, *rest)
    return out.view(*input.shape[:-1], weight_int8.shape[0])


def _check(input, weight_int8, weight_scale, bias, packed) -> None:
    if input.is_nested:
        raise ValueError("input must not be a nested tensor: pad it, or optimize its layer")
    if input.dtype not in KERNEL_DTYPES and input.dtype != torch.float64:
        raise TypeError(f"input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    check_int8(weight_int8=weight_int8)
    check_shapes(input, weight_int8, ("input", "weight_int8"))
    outer = weight_int8.shape[0]
    check_beside(
        input,
        weight_int8=(weight_int8, weight_int8.shape, torch.int8),
        weight_scale=(weight_scale, (outer,), torch.float32),
        bias=(bias, (outer,), input.dtype),
        packed=(packed, packed_shape(weight_int8), torch.int8),
    )


def int8_linear_rows(
    input: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    packed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``int8_linear`` whose result becomes int8 where it is made: rows and scales for ``int8_matmul``.

    Returns [..., out] and float32 scales [...], as ``int8_quantize`` makes them of ``int8_linear``;
    after relu or relu2, which leave nothing negative, uint8 with 255 steps in place of 127. On CPUs the
    floating point result of a few rows lives in the cache alone. Arguments and errors are those of
    ``int8_linear``, in "dynamic" mode without outliers; float64 raises. Not differentiable.
    """
    code = _activations.code_of(activation)
    input, bias = autocast(input, bias)
    _check(input, weight_int8, weight_scale, bias, packed)
    if input.dtype not in KERNEL_DTYPES:
        raise TypeError(f"input must be float32, bfloat16 or float16, got {input.dtype}")
    made = _linear_rows_reference if use_reference(backend, input.dtype) else _linear_rows
    bias = None if bias is None else bias.detach()
    rows, scale = made(as_rows(input.detach()), weight_int8, weight_scale, packed, bias, code)
    return rows.view(*input.shape[:-1], weight_int8.shape[0]), scale.view(input.shape[:-1])


def int8_linear_reference(*args, **options) -> Tensor:
    """The definition of ``int8_linear``: plain torch ops, any device."""
    return int8_linear(*args, **options, backend="reference")
