"""Layer normalization with int8 rows as its result.

    h = residual + x
    rows, scale = int8_quantize(layer_norm(h))

The formulas are those of ``ops/layer_norm.py`` and ``ops/int8.py``, with the norm rounded to its
dtype before it is quantized; the norm itself is not written to memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmos_kernels._core.registry import KERNEL_DTYPES, define, use_reference
from llmos_kernels.ops._norm import check_norm, check_residual, normalize, rows_of
from llmos_kernels.ops.int8 import quantize_reference

__all__ = ["int8_add_layer_norm", "int8_layer_norm"]


def _reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    d: int,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    h = x if residual is None else residual + x
    y, _ = normalize(h, weight, bias, d, eps, center)
    rows, scale = quantize_reference(rows_of(y, d))
    return rows.view(x.shape), scale, x.new_empty(0) if residual is None else h.contiguous()


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    d: int,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(x.numel() // d if d else 0, dtype=torch.float32)
    return rows, scale, x.new_empty(0 if residual is None else x.shape)


_norm = define(
    "int8_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, int d, float eps,"
    " bool center) -> (Tensor rows, Tensor scale, Tensor h)",
    reference=_reference,
    fake=_fake,
    triton="int8.layer_norm:norm",
)


def _call(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, scales and h; h is empty without a residual."""
    if input.dtype not in KERNEL_DTYPES:
        raise TypeError(f"input must be float32, bfloat16 or float16, got {input.dtype}")
    d = check_norm(input, normalized_shape, weight, bias)
    x = input.detach()
    residual, weight, bias = (None if t is None else t.detach() for t in (residual, weight, bias))
    shape = input.shape[: input.ndim - len(normalized_shape)]
    if d == 0:  # The kernels get the number of rows from numel() / d.
        zeros = input.new_zeros(shape, dtype=torch.float32)
        return x.to(torch.int8), zeros, x.clone()
    made = _reference if use_reference(backend, input.dtype) else _norm
    rows, scale, h = made(x, residual, weight, bias, d, eps, True)
    return rows, scale.view(shape), h


def int8_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``int8_quantize(layer_norm(input))``, a row being all of ``normalized_shape``.

    Args:
        input: [..., *normalized_shape], float32, bfloat16 or float16, any strides.
        normalized_shape: The last dimensions of ``input``.
        weight: [*normalized_shape], of the dtype of ``input`` or float32; or None.
        bias: Like ``weight``.
        eps: Added to the variance.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        The rows, int8 of the shape of ``input``, and their scales [...], float32. Not
        differentiable.

    Raises:
        ValueError: Shapes or devices disagree.
        TypeError: A dtype is not as above.

    Example:
        >>> rows, scale = int8_layer_norm(torch.randn(8, 768), (768,))
        >>> rows.dtype, scale.shape
        (torch.int8, torch.Size([8]))

    Ba et al. 2016, arXiv:1607.06450.
    """
    return _call(input, None, normalized_shape, weight, bias, eps, backend)[:2]


def int8_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows and scales of ``int8_layer_norm(h)``, and ``h = residual + input``.

    Args:
        input: [..., *normalized_shape], float32, bfloat16 or float16, any strides.
        residual: Of the shape of ``input``; where the dtypes differ, both are taken in the common
            one.
        normalized_shape: The last dimensions of ``input``.
        weight: [*normalized_shape], of the dtype of ``h`` or float32; or None.
        bias: Like ``weight``.
        eps: Added to the variance.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        The rows, int8 of the shape of ``input``, their scales [...], float32, and ``h``. Not
        differentiable.

    Raises:
        ValueError: Shapes or devices disagree.
        TypeError: A dtype is not as above.

    Example:
        >>> x = torch.randn(8, 768)
        >>> rows, scale, h = int8_add_layer_norm(x, x, (768,))
    """
    input, residual = check_residual(input, residual)
    return _call(input, residual, normalized_shape, weight, bias, eps, backend)
