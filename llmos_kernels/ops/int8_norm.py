"""LayerNorm that gives int8 rows: ``int8_quantize(layer_norm(x))`` without the float result.

Rows and scales are those of the two ops one after the other, the norm rounded to its dtype between.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmos_kernels._core.registry import KERNEL_DTYPES, define, use_reference
from llmos_kernels.ops.int8 import quantize_reference
from llmos_kernels.ops.layer_norm import check_norm, check_residual, normalize, rows_of


def _reference(x, residual, weight, bias, d, eps, center):
    h = x if residual is None else residual + x
    y, _ = normalize(h, weight, bias, d, eps, center)
    rows, scale = quantize_reference(rows_of(y, d))
    return rows.view(x.shape), scale, x.new_empty(0) if residual is None else h.contiguous()


def _fake(x, residual, weight, bias, d, eps, center):
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


def _call(input, residual, normalized_shape, weight, bias, eps, backend):
    if input.dtype not in KERNEL_DTYPES:
        raise TypeError(f"input must be float32, bfloat16 or float16, got {input.dtype}")
    d = check_norm(input, normalized_shape, weight, bias)
    x, residual, weight, bias = (
        t if t is None else t.detach() for t in (input, residual, weight, bias)
    )
    shape = input.shape[: input.ndim - len(normalized_shape)]
    if d == 0:  # Rows of nothing: their number is in the shape alone.
        zeros = input.new_zeros(shape, dtype=torch.float32)
        return input.detach().to(torch.int8), zeros, input.detach().clone()
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
    """``int8_quantize`` of ``layer_norm``, each row over all of ``normalized_shape``, in one pass.

    Arguments as for ``layer_norm``, but float64 raises TypeError. Returns int8 like ``input`` and
    float32 scales, one for each row. Not differentiable.
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
    """The same of ``h = residual + input``; returns rows, scales and ``h``."""
    input, residual = check_residual(input, residual)
    return _call(input, residual, normalized_shape, weight, bias, eps, backend)
