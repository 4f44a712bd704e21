"""Products of int8 rows, and the quantization of rows to int8.

    scale_i = max_k |x_ik| / 127,   q_ik = round(x_ik * (127 / max_k |x_ik|))
    out_ij = activation(sum_k a_ik b_jk * a_scale_i * b_scale_j + bias_j)

Rounding is of float32 values, ties to even. The sum is int32 and exact; it is multiplied by
a_scale, then by b_scale, in float32, and rounded to the dtype of the result before the activation.
A row whose largest magnitude is below 1e-36 becomes 0 with scale 0; a row that holds NaN or
infinity becomes 0 with scale NaN, so that its results are NaN.
"""

import torch
from torch import Tensor

from llmos_kernels._core.registry import KERNEL_DTYPES, define, use_reference
from llmos_kernels.ops import _activations, _products
from llmos_kernels.ops.linear import as_rows

__all__ = ["int8_matmul", "int8_quantize"]

#: The deepest product of int8 by int8 whose sum fits int32: each term is at most 128^2.
MAX_INNER = (1 << 17) - 1
#: The same of uint8 by int8, whose terms are at most 255 * 128.
MAX_UNSIGNED = (2**31 - 1) // (255 * 128)
#: The VNNI layout of a weight: panels of 64 outputs, 4 consecutive inputs of one output in 32 bits.
VNNI_OUTPUTS, VNNI_INPUTS = 64, 4
#: A row whose largest magnitude is smaller becomes 0.
SMALLEST = 1e-36


def quantize_reference(input: Tensor, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """Return the int8 rows of ``input`` [rows, in] and their float32 scales [rows].

    ``unsigned`` is for rows without negative elements: uint8 with 255 steps in place of 127.
    """
    x = input.float()
    dtype, levels = (torch.uint8, 255) if unsigned else (torch.int8, 127)
    if x.shape[1] == 0:
        return x.to(dtype), x.new_zeros(x.shape[0])
    largest = x.abs().amax(1)
    zero = ~(largest >= SMALLEST) | largest.isinf()
    scale = torch.where(largest < SMALLEST, 0.0, largest / levels)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    # torch computes number / tensor as the tensor's reciprocal times the number, rounded twice.
    inverse = torch.where(zero, 0.0, torch.full_like(largest, levels) / largest)
    rows = torch.where(zero[:, None], 0.0, (x * inverse[:, None]).round())
    return rows.to(dtype), scale


def matmul_reference(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    vnni_weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    dtype: torch.dtype,
    outlier_sums: Tensor | float = 0,
) -> Tensor:
    """Return the product of ``a`` [rows, in] and ``b`` [out, in], scaled, as [rows, out].

    ``outlier_sums`` [rows, out] is added before the multiplication by ``b_scale``.
    """
    # float64 holds the sums exactly.
    sums = (a.double() @ b.double().mT).float()
    z = (sums * a_scale[:, None] + outlier_sums) * b_scale[None, :]
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
    triton="int8.quantize:quantize",
)
_matmul = define(
    "int8_matmul(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? vnni_weight,"
    " Tensor? bias, int activation, ScalarType dtype) -> Tensor",
    reference=matmul_reference,
    fake=lambda a, b, a_scale, b_scale, vnni_weight, bias, activation, dtype: a.new_empty(
        a.shape[0], b.shape[0], dtype=dtype
    ),
    triton="int8.linear:matmul",
    flops=_products.flops_of_rows,
)


def int8_quantize(input: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Return ``input`` as int8 rows, symmetric about 0, and their scales.

    Args:
        input: [..., in], float32, bfloat16 or float16, any strides.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        The rows, int8 of the shape of ``input``, and the scales [...], float32:
        ``rows * scale[..., None]`` differs from ``input`` by at most half a scale. A row of zeros
        has scale 0, one that is not finite scale NaN. Not differentiable.

    Raises:
        TypeError: ``input`` has another dtype.
        ValueError: ``input`` has no dimension.

    Example:
        >>> rows, scale = int8_quantize(torch.tensor([[1.0, -2.0]]))
        >>> rows
        tensor([[  64, -127]], dtype=torch.int8)
    """
    if input.dtype not in KERNEL_DTYPES:
        raise TypeError(f"input must be float32, bfloat16 or float16, got {input.dtype}")
    if input.ndim == 0:
        raise ValueError("input must have a dimension to quantize over, got none")
    quantize = quantize_reference if use_reference(backend, input.dtype) else _quantize
    rows, scale = quantize(as_rows(input.detach()))
    return rows.view(input.shape), scale.view(input.shape[:-1])


def vnni_shape(weight: Tensor) -> tuple[int, ...]:
    """Return the shape of ``weight`` [out, in] in the VNNI layout."""
    panels, groups = -(-weight.shape[0] // VNNI_OUTPUTS), -(-weight.shape[1] // VNNI_INPUTS)
    return panels, groups, VNNI_OUTPUTS, VNNI_INPUTS


def check_int8(**tensors: Tensor) -> None:
    """Raise TypeError for a tensor that is not int8, by its name."""
    for name, t in tensors.items():
        if t.dtype != torch.int8:
            raise TypeError(f"{name} must be int8, got {t.dtype}")


def check_shapes(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    """Raise ValueError unless ``a`` is [..., in] and ``b`` [out, in], with sums that fit int32."""
    if b.ndim != 2 or a.ndim == 0 or a.shape[-1] != b.shape[1]:
        raise ValueError(
            f"{names[1]} must be [out, in] with in the last dimension of {names[0]}, got"
            f" {names[1]} {list(b.shape)}, {names[0]} {list(a.shape)}"
        )
    limit = MAX_UNSIGNED if a.dtype == torch.uint8 else MAX_INNER
    if b.shape[1] > limit:
        raise ValueError(f"sums of {b.shape[1]} products could leave int32, at most {limit}")


def check_beside(
    reference: Tensor, **others: tuple[Tensor | None, tuple[int, ...], torch.dtype]
) -> None:
    """Raise unless each of ``others``, a tensor or None, has the shape and dtype given with it.

    ``reference`` says which device all must be on.
    """
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
    vnni_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``activation((a @ b.mT) * a_scale[..., None] * b_scale + bias)``, in one pass.

    Args:
        a: [..., in], int8 or uint8, any strides.
        b: [out, in], int8, any strides.
        a_scale: [...], float32.
        b_scale: [out], float32.
        bias: [out], of ``out_dtype``, or None.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh" or "silu".
        out_dtype: float32, bfloat16 or float16.
        vnni_weight: ``int8_vnni_weight(b)``, or None.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        [..., out], of ``out_dtype``. The sums are exact. Not differentiable.

    Raises:
        ValueError: Shapes or devices disagree, a name is unknown, or ``in`` is above 131,071
            (65,793 for uint8), where a sum could leave int32.
        TypeError: A dtype is not as above.

    Example:
        >>> a, b = torch.ones(2, 8, dtype=torch.int8), torch.ones(4, 8, dtype=torch.int8)
        >>> int8_matmul(a, b, torch.ones(2), torch.ones(4))[0]
        tensor([8., 8., 8., 8.])
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
        vnni_weight=(vnni_weight, vnni_shape(b), torch.int8),
    )
    b, a_scale, b_scale = b.detach(), a_scale.detach().reshape(-1), b_scale.detach()
    bias = None if bias is None else bias.detach()
    args = as_rows(a), b, a_scale, b_scale, vnni_weight, bias, code, out_dtype
    out = matmul_reference(*args) if use_reference(backend, out_dtype) else _matmul(*args)
    return out.view(*a.shape[:-1], b.shape[0])
