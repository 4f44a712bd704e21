"""The matrix products of linear layers with what is fused into them, and who computes each.

    z = input weight^T + bias,   y = dropout(activation(z))

z is rounded to the dtype of ``input`` before the activation, as in torch; sums are float32.
Backward, with f the dropout factors (0 or 1 / (1 - p)) and ``kept`` as ``ops/_activations.py`` says:

    dz = dy f activation'(kept),   dinput = dz weight,   dweight = dz^T input,   dbias = sum(dz)

A chain of two (``ops/feed_forward.py``) multiplies by f activation' of the first where dinput of the
second leaves its product, and sums it up for the bias there. The mask of dropout is that of
``ops/_dropout.py`` on the rows of y.

On CPUs torch's own products answer where they were measured to be faster (``torch_from``): oneDNN's for
large ones in bfloat16, MKL's on Intel's CPUs in float32. On GPUs cuBLAS answers where there is nothing to
fuse.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels._registry import define
from llmos_kernels.ops import _activations
from llmos_kernels.ops._activations import NONE
from llmos_kernels.ops._dropout import dropout_reference, keep_mask


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, with sums in float32 and the dtype of ``a``."""
    acc = torch.promote_types(a.dtype, torch.float32)
    return a.to(acc) @ b.to(acc)


def transform(
    rows: Tensor, weight: Tensor, bias: Tensor | None, activation: int, p: float, seed
) -> tuple[Tensor, Tensor]:
    """y and z of ``rows`` [rows, in], by differentiable torch ops."""
    z = _product(rows, weight.mT)
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = z.to(rows.dtype)
    return activate_rows(z, activation, p, seed), z


def activate_rows(z: Tensor, activation: int, p: float, seed: Tensor | None) -> Tensor:
    """dropout(activation(z)) of ``z`` [rows, out], rounded once; differentiable."""
    acc = torch.promote_types(z.dtype, torch.float32)
    y = _activations.activate(z.to(acc), activation)
    return (y if seed is None else dropout_reference(y, seed, p)).to(z.dtype)


def slopes(kept: Tensor, activation: int, p: float, seed: Tensor | None) -> Tensor:
    """f activation'(kept), in the accumulation dtype; differentiable."""
    acc = torch.promote_types(kept.dtype, torch.float32)
    slope = _activations.derivative(kept.to(acc), activation)
    if seed is not None:
        slope = slope * keep_mask(seed, kept.shape[0], kept.shape[1], p) / (1 - p)
    return slope


def _forward_reference(input, weight, bias, activation, dropout_p, seed, keep):
    y, z = transform(input, weight, bias, activation, dropout_p, seed)
    return y.contiguous(), z.contiguous() if keep else y.new_empty(0)


def _dinput_reference(dout, weight, kept, activation, dropout_p, seed):
    dinput = _product(dout, weight)
    if kept is None:
        return dinput.to(dout.dtype).contiguous(), dout.new_empty(0)
    dinput = dinput * slopes(kept, activation, dropout_p, seed)
    return dinput.to(dout.dtype).contiguous(), dinput.sum(0).to(dout.dtype)


def _dweight_reference(dout, input, bias):
    dbias = dout.sum(0, dtype=torch.promote_types(dout.dtype, torch.float32))
    dweight = _product(dout.mT, input).to(dout.dtype)
    return dweight.contiguous(), dbias.to(dout.dtype) if bias else dout.new_empty(0)


def _activation_forward_reference(kept, activation, dropout_p, seed):
    return activate_rows(kept, activation, dropout_p, seed).contiguous()


def _activation_backward_reference(dout, kept, activation, dropout_p, seed):
    return (dout * slopes(kept, activation, dropout_p, seed)).to(dout.dtype).contiguous()


_DROPOUT = "int activation, float dropout_p, Tensor? seed"

linear_forward = define(
    f"linear_forward(Tensor input, Tensor weight, Tensor? bias, {_DROPOUT}, bool keep)"
    " -> (Tensor out, Tensor kept)",
    reference=_forward_reference,
    fake=lambda input, weight, bias, activation, dropout_p, seed, keep: (
        input.new_empty(input.shape[0], weight.shape[0]),
        input.new_empty((input.shape[0], weight.shape[0]) if keep else 0),
    ),
    triton="linear:forward",
)
linear_dinput = define(
    f"linear_dinput(Tensor dout, Tensor weight, Tensor? kept, {_DROPOUT})"
    " -> (Tensor dinput, Tensor dbias)",
    reference=_dinput_reference,
    fake=lambda dout, weight, kept, activation, dropout_p, seed: (
        dout.new_empty(dout.shape[0], weight.shape[1]),
        dout.new_empty(0 if kept is None else weight.shape[1]),
    ),
    triton="linear_backward:dinput",
)
linear_dweight = define(
    "linear_dweight(Tensor dout, Tensor input, bool bias) -> (Tensor dweight, Tensor dbias)",
    reference=_dweight_reference,
    fake=lambda dout, input, bias: (
        dout.new_empty(dout.shape[1], input.shape[1]),
        dout.new_empty(dout.shape[1] if bias else 0),
    ),
    triton="linear_backward:dweight",
)
activation_forward = define(
    f"activation_forward(Tensor kept, {_DROPOUT}) -> Tensor",
    reference=_activation_forward_reference,
    fake=lambda kept, activation, dropout_p, seed: kept.new_empty(kept.shape),
    triton="activation:forward",
)
activation_backward = define(
    f"activation_backward(Tensor dout, Tensor kept, {_DROPOUT}) -> Tensor",
    reference=_activation_backward_reference,
    fake=lambda dout, kept, activation, dropout_p, seed: dout.new_empty(dout.shape),
    triton="activation:backward",
)

_ONEDNN_NAMES = {
    NONE: ("none", ""),
    _activations.RELU: ("relu", ""),
    _activations.GELU: ("gelu", "none"),
    _activations.GELU_TANH: ("gelu", "tanh"),
    _activations.SILU: ("swish", ""),
}
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)
#: Whether this CPU multiplies matrix tiles (AMX), as oneDNN does.
_HAS_TILES = torch.cpu._is_amx_tile_supported()
_EXTENSION = sys.modules.get("llmos_kernels._C")
#: How this library does: "amx" has tiles too, "avx512_bf16" multiplies pairs.
_LEVEL = _EXTENSION.cpu_level() if _EXTENSION is not None else "none"
#: Whether torch's float32 products are those of MKL on a CPU that it was written for.
_HAS_MKL = torch.backends.mkl.is_available() and _EXTENSION is not None and _EXTENSION.is_intel()
#: Levels whose CPUs multiply no pairs of bfloat16, nor does torch there but by a loop, or widened by oneDNN.
_WITHOUT_PAIRS = "baseline", "avx2", "avx512"
_HAS_FLOAT16 = _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported()
_NEVER = 1, 1 << 62


def has_onednn() -> bool:
    """Whether torch's oneDNN multiplies bfloat16 on this CPU, with a bias and an activation."""
    return _HAS_ONEDNN and (torch.compiler.is_compiling() or bool(torch.backends.mkldnn.enabled))


def torch_from(dtype: torch.dtype, product: str = "forward") -> tuple[int, int]:
    """Rows and multiplications from which on torch's product answers on this CPU, as measured.

    ``product`` is "forward", "dinput", "slope" (dinput times a derivative, which ours has in one pass)
    or "dweight".
    """
    if dtype == torch.bfloat16 and has_onednn():
        if _LEVEL == "amx":
            return {
                "forward": (6144, 1 << 30),
                "dinput": (64, 1 << 32),
                "dweight": (2048, 1 << 22),
            }.get(product, _NEVER)
        if _HAS_TILES:
            return 64, 1 << 26
        if _LEVEL in _WITHOUT_PAIRS:  # oneDNN widens them there, slower than ours.
            return _NEVER
        return (256, 1 << 28) if product == "forward" else _NEVER
    if dtype == torch.float32 and _HAS_MKL:
        return {"forward": (64, 1 << 26), "dinput": (1, 1 << 20), "dweight": (1, 1 << 20)}.get(
            product, _NEVER
        )
    return _NEVER


def _is_for_torch(rows: Tensor, columns: int, product: str) -> bool:
    if not rows.is_cpu:
        return False
    least, work = torch_from(rows.dtype, product)
    return rows.shape[0] >= least and rows.numel() * columns >= work


def faster_between(dtype: torch.dtype) -> tuple[int, int]:
    """Multiplications from which on, and below which, ``forward`` beats torch's product on this CPU
    where nothing is fused; (0, 0) if nowhere."""
    if _EXTENSION is None:
        return 0, 0
    if dtype == torch.float32:
        return 1 << 18, 1 << 62
    if dtype == torch.float16 and not _HAS_FLOAT16:
        return 1 << 12, 1 << 62
    if dtype == torch.bfloat16 and (_LEVEL in ("amx", *_WITHOUT_PAIRS) or not has_onednn()):
        return 1 << 12, 1 << 62
    if dtype == torch.bfloat16 and not _HAS_TILES:
        return 1 << 12, 1 << 26
    return 0, 0


def forward(
    rows: Tensor, weight: Tensor, bias: Tensor | None, activation: int, p: float, seed, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """y of ``rows`` [rows, in], and z where ``keep``."""
    plain = seed is None and not keep and activation in _ONEDNN_NAMES
    if plain and activation == NONE and rows.is_cuda:
        return F.linear(rows, weight, bias), None
    if plain and _is_for_torch(rows, weight.shape[0], "forward"):
        if rows.dtype == torch.bfloat16:
            name, algorithm = _ONEDNN_NAMES[activation]
            y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, name, [], algorithm)
            return y, None
        if activation == NONE:
            return F.linear(rows, weight, bias), None
    y, z = linear_forward(rows, weight, bias, activation, p, seed, keep)
    return y, z if keep else None


def dinput(
    dz: Tensor, weight: Tensor, kept: Tensor | None, activation: int, p: float, seed
) -> tuple[Tensor, Tensor]:
    """dz weight, times the derivative at ``kept`` where it is given, and then its sum over rows."""
    if kept is None and dz.is_cuda:
        return dz @ weight, dz.new_empty(0)
    if _is_for_torch(dz, weight.shape[1], "dinput" if kept is None else "slope"):
        product = dz.contiguous() @ weight
        if kept is None:
            return product, product.new_empty(0)
        product = activation_backward(product, kept, activation, p, seed)
        return product, sum_of_rows(product)
    return linear_dinput(dz, weight, kept, activation, p, seed)


def parameter_gradients(dz: Tensor, input: Tensor, of_weight: bool, of_bias: bool) -> tuple:
    """dweight and dbias where they are wanted, else None."""
    if not of_weight:
        return None, sum_of_rows(dz) if of_bias else None
    by_torch = _is_for_torch(dz, input.shape[1], "dweight")
    if by_torch:  # Packed: the same bits in every layout.
        dz, input = dz.contiguous(), input.contiguous()
    if by_torch or dz.is_cuda:
        return dz.mT @ input, sum_of_rows(dz) if of_bias else None
    dweight, dbias = linear_dweight(dz, input, of_bias)
    return dweight, dbias if of_bias else None


def sum_of_rows(dz: Tensor) -> Tensor:
    """The sum over rows, in float32 and rounded once."""
    return dz.sum(0, dtype=torch.promote_types(dz.dtype, torch.float32)).to(dz.dtype)


def linear_gradients(dz: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
    """dinput, dweight and dbias, by differentiable torch ops."""
    of_input, of_weight = _product(dz, weight), _product(dz.mT, input)
    of_bias = None if bias is None else dz.sum(0, dtype=of_weight.dtype).to(bias.dtype)
    return of_input.to(input.dtype), of_weight.to(weight.dtype), of_bias
