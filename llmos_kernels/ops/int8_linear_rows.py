"""Linear layers with an int8 weight and an int8 result: the input of another int8 product.

    y = int8_linear(input),   rows, scale = int8_quantize(y)

On CPUs only a few rows of y exist at a time, in the cache. After relu and relu2, which leave
nothing negative, the rows are uint8 with 255 steps.
"""

import torch
from torch import Tensor

from llmos_kernels._core.registry import KERNEL_DTYPES, define, use_reference
from llmos_kernels.ops import _activations, _products
from llmos_kernels.ops._activations import RELU, RELU2
from llmos_kernels.ops._autocast import autocast
from llmos_kernels.ops.int8 import quantize_reference
from llmos_kernels.ops.int8_linear import WEIGHT, check_int8_linear, dynamic_reference
from llmos_kernels.ops.linear import as_rows

__all__ = ["int8_linear_rows"]

#: Activations without negative results.
_NONNEGATIVE = RELU, RELU2


def _linear_rows_reference(
    input: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    vnni_weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor]:
    y = dynamic_reference(input, weight_int8, weight_scale, vnni_weight, bias, activation, 0.0)
    return quantize_reference(y, activation in _NONNEGATIVE)


def _linear_rows_fake(
    input: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    vnni_weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor]:
    dtype = torch.uint8 if activation in _NONNEGATIVE else torch.int8
    rows = input.new_empty(input.shape[0], weight_int8.shape[0], dtype=dtype)
    return rows, input.new_empty(input.shape[0], dtype=torch.float32)


_linear_rows = define(
    f"int8_linear_rows({WEIGHT}, Tensor? vnni_weight, Tensor? bias, int activation)"
    " -> (Tensor rows, Tensor scale)",
    reference=_linear_rows_reference,
    fake=_linear_rows_fake,
    triton="int8.linear:linear_rows",
    flops=_products.flops_of_rows,
)


def int8_linear_rows(
    input: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    vnni_weight: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``int8_linear(...)`` with its rows quantized, and their scales, for ``int8_matmul``.

    On CPUs only a few rows of the floating point result exist at a time, in the cache.

    Args:
        input: [..., in], float32, bfloat16 or float16, any strides.
        weight_int8: [out, in], int8, as ``int8_quantize`` makes it.
        weight_scale: [out], float32, as ``int8_quantize`` makes it.
        bias: [out], of the dtype of ``input``, or None.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh" or "silu".
        vnni_weight: ``int8_vnni_weight(weight_int8)``, or None.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        The rows [..., out], int8, and the scales [...], float32. After relu and relu2, which leave
        nothing negative, the rows are uint8 with 255 steps in place of 127. Not differentiable.

    Raises:
        ValueError: As for ``int8_linear``.
        TypeError: As for ``int8_linear``; float64 raises.

    Example:
        >>> weight, scale = int8_quantize(torch.randn(512, 768))
        >>> rows, row_scale = int8_linear_rows(torch.randn(4, 768), weight, scale)
        >>> rows.shape, row_scale.shape
        (torch.Size([4, 512]), torch.Size([4]))
    """
    code = _activations.code_of(activation)
    input, bias = autocast(input, bias)
    check_int8_linear(input, weight_int8, weight_scale, bias, vnni_weight)
    if input.dtype not in KERNEL_DTYPES:
        raise TypeError(f"input must be float32, bfloat16 or float16, got {input.dtype}")
    made = _linear_rows_reference if use_reference(backend, input.dtype) else _linear_rows
    bias = None if bias is None else bias.detach()
    rows, scale = made(as_rows(input.detach()), weight_int8, weight_scale, vnni_weight, bias, code)
    return rows.view(*input.shape[:-1], weight_int8.shape[0]), scale.view(input.shape[:-1])
