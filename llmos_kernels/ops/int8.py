"""Products of int8 rows, and how rows become int8.

    scale_i = max_k |x_ik| / 127,   q_ik = round(x_ik * (127 / max_k |x_ik|))    in float32, ties to even
    out_ij = activation(sum_k a_ik b_jk * a_scale_i * b_scale_j + bias_j)

The sum is int32 and exact; it is multiplied by both scales in float32, in this order, and rounded to the
dtype of the result before the activation. A row whose largest magnitude is below 1e-36 is 0, with scale
0; one that holds NaN or infinity is 0 with scale NaN, so that its results are NaN.
"""

import torch
from torch import Tensor

from llmos_kernels._registry import KERNEL_DTYPES, define, use_reference
from llmos_kernels.ops import _activations, _products
from llmos_kernels.ops.linear import as_rows

#: A longer sum of products, each up to 128^2, could leave int32.
MAX_INNER = (1 << 17) - 1
MAX_UNSIGNED = (2**31 - 1) // (255 * 128)
#: Columns of out in a strip of a packed weight, and elements of one of its rows side by side.
STRIP, UNIT = 64, 4
#: The largest magnitude of a row that is not 0.
SMALLEST = 1e-36


def quantize_reference(input: Tensor, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """``unsigned`` is for rows without negative elements: 255 in place of 127, uint8."""
    x = input.float()
    dtype, levels = (torch.uint8, 255) if unsigned else (torch.int8, 127)
    if x.shape[1] == 0:
        return x.to(dtype), x.new_zeros(x.shape[0])
    largest = x.abs().amax(1)
    zero = ~(largest >= SMALLEST) | largest.isinf()
    scale = torch.where(largest < SMALLEST, 0.0, largest / levels)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    # A number over a tensor would be its reciprocal times the number.
    inverse = torch.where(zero, 0.0, torch.full_like(largest, levels) / largest)
    rows = torch.where(zero[:, None], 0.0, (x * inverse[:, None]).round())
    return rows.to(dtype), scale


def matmul_reference(a, b, a_scale, b_scale, packed, bias, activation, dtype, more=0):
    """``more`` joins the sums before they are scaled by ``b_scale``."""
    # float64 holds the sums exactly.
    z = ((a.double() @ b.double().mT).float() * a_scale[:, None] + more) * b_scale[None, :]
    if bias is not None:
        z = z + bias.float()
    return _products.activate_rows(z.to(dtype), activation, 0.0, None).contiguous()


_quantize = define(
    "int8_quantize(Tensor input) -> (Tensor rows, Tensor scale)",
    reference=quantize_reference,
    fake=lambda input: (
        input.new_empty(input.shape, dtype=torch.int8),
        input.new_empty(input.shape[0], dtype=torch.float32),
    ),
    triton="int8:quantize",
)
_matmul = define(
    "int8_matmul(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? packed, Tensor? bias,"
    " int activation, ScalarType dtype) -> Tensor",
    reference=matmul_reference,
    fake=lambda a, b, a_scale, b_scale, packed, bias, activation, dtype: a.new_empty(
        a.shape[0], b.shape[0], dtype=dtype
    ),
    triton="int8:matmul",
)


def int8_quantize(input: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Rows of int8, symmetric about 0, and their scales.

    ``input`` [..., in]: float32, bfloat16 or float16, any strides. Returns int8 of the same shape and
    float32 scales [...]: ``rows * scale[..., None]`` is ``input`` to half a scale. A row of zeros has
    scale 0, one that is not finite scale NaN. Not differentiable. Raises TypeError for another dtype,
    ValueError for a tensor without dimensions.
    """
    if input.dtype not in KERNEL_DTYPES:
        raise TypeError(f"input must be float32, bfloat16 or float16, got {input.dtype}")
    if input.ndim == 0:
        raise ValueError("input must have a dimension to quantise over, got none")
    quantize = quantize_reference if use_reference(backend, input.dtype) else _quantize
    rows, scale = quantize(as_rows(input.detach()))
    return rows.view(input.shape), scale.view(input.shape[:-1])


def packed_shape(b: Tensor) -> tuple[int, ...]:
    """Of what ``int8_pack`` makes of ``b`` [out, in]."""
    return -(-b.shape[0] // STRIP), -(-b.shape[1] // UNIT), STRIP, UNIT


def check_int8(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dtype != torch.int8:
            raise TypeError(f"{name} must be int8, got {t.dtype}")


def check_shapes(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    if b.ndim != 2 or a.ndim == 0 or a.shape[-1] != b.shape[1]:
        raise ValueError(
            f"{names[1]} must be [out, in] with in the last dimension of {names[0]}, got"
            f" {names[1]} {list(b.shape)}, {names[0]} {list(a.shape)}"
        )
    most = MAX_UNSIGNED if a.dtype == torch.uint8 else MAX_INNER
    if b.shape[1] > most:
        raise ValueError(f"sums of {b.shape[1]} products could leave int32, at most {most}")


def check_beside(reference: Tensor, **others: tuple[Tensor | None, tuple, torch.dtype]):
    for name, (t, shape, dtype) in others.items():
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(t.shape)}")
        if t.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
        if t.device != reference.device:
            raise ValueError(f"{name} is on {t.device}, the rest on {reference.device}")


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    packed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``activation((a @ b.mT) * a_scale[..., None] * b_scale + bias)`` in one pass, from int8.

    ``a`` [..., in], int8 or uint8, and ``b`` [out, in], int8, any sizes and strides; ``a_scale`` [...] and ``b_scale``
    [out], float32; ``bias`` [out] and the result [..., out] of ``out_dtype``: float32, bfloat16 or
    float16. ``activation`` as for ``linear``, ``packed`` as for ``int8_linear``. The sums are exact. Not differentiable. Raises ValueError
    for shapes, devices or names and for more than 131,071 columns (65,793 of uint8), whose sums could
    leave int32, TypeError for dtypes.
    """
    code = _activations.code_of(activation)
    if out_dtype not in KERNEL_DTYPES:
        raise TypeError(f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
    if a.dtype != torch.uint8:
        check_int8(a=a)
    check_int8(b=b)
    check_shapes(a, b, ("a", "b"))
    check_beside(
        a,
        b=(b, b.shape, torch.int8),
        a_scale=(a_scale, a.shape[:-1], torch.float32),
        b_scale=(b_scale, b.shape[:1], torch.float32),
        bias=(bias, b.shape[:1], out_dtype),
        packed=(packed, packed_shape(b), torch.int8),
    )
    b, a_scale, b_scale = b.detach(), a_scale.detach().reshape(-1), b_scale.detach()
    bias = None if bias is None else bias.detach()
    args = as_rows(a), b, a_scale, b_scale, packed, bias, code, out_dtype
    out = matmul_reference(*args) if use_reference(backend, out_dtype) else _matmul(*args)
    return out.view(*a.shape[:-1], b.shape[0])
