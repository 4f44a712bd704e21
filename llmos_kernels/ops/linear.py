"""A matrix product with its bias, activation and dropout, and the products of its gradients.

    z = input weight^T + bias,   y = dropout(activation(z))

z is rounded to the dtype of ``input`` before the activation, as in torch; sums are float32.
Backward, with f the dropout factors (0 or 1 / (1 - p)) and ``kept`` as ``ops/activations.py`` says:

    dz = dy f activation'(kept),   dinput = dz weight,   dweight = dz^T input,   dbias = sum(dz)

A chain of two (``ops/feed_forward.py``) multiplies by f activation' of the first where dinput of the
second leaves its product, and sums it up for the bias there. The mask of dropout is that of
``ops/dropout.py`` on the rows of y.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels._registry import KERNEL_DTYPES, define, needs_grad, use_reference
from llmos_kernels.ops import activations
from llmos_kernels.ops.activations import NONE, RELU, keeps_input
from llmos_kernels.ops.autocast import autocast
from llmos_kernels.ops.dropout import dropout_reference, keep_mask


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
    y = activations.activate(z.to(acc), activation)
    return (y if seed is None else dropout_reference(y, seed, p)).to(z.dtype)


def slopes(kept: Tensor, activation: int, p: float, seed: Tensor | None) -> Tensor:
    """f activation'(kept), in the accumulation dtype; differentiable."""
    acc = torch.promote_types(kept.dtype, torch.float32)
    slope = activations.derivative(kept.to(acc), activation)
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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, activation):
        keep = keeps_input(activation)
        out, z = linear_forward(input, weight, bias, activation, 0.0, None, keep)
        kept = z if keep else out if activation == RELU else None
        ctx.save_for_backward(input, weight, bias, kept)
        ctx.activation = activation
        return out

    @staticmethod
    def backward(ctx, dout):
        input, weight, bias, kept = ctx.saved_tensors
        activation = ctx.activation
        if torch.is_grad_enabled():
            z = transform(input, weight, bias, NONE, 0.0, None)[1]
            dz = dout * slopes(z, activation, 0.0, None)
            return (*linear_gradients(dz, input, weight, bias), None)
        dz = dout
        if kept is not None:
            dz = activation_backward(dout, kept, activation, 0.0, None)
        of_input, of_weight, of_bias, _ = ctx.needs_input_grad
        dinput = linear_dinput(dz, weight, None, NONE, 0.0, None)[0] if of_input else None
        dweight, dbias = parameter_gradients(dz, input, of_weight, of_bias)
        return dinput, dweight, dbias, None


def linear_gradients(dz: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
    """dinput, dweight and dbias, by differentiable torch ops."""
    dinput, dweight = _product(dz, weight), _product(dz.mT, input)
    dbias = None if bias is None else dz.sum(0, dtype=dweight.dtype).to(bias.dtype)
    return dinput.to(input.dtype), dweight.to(weight.dtype), dbias


def parameter_gradients(dz: Tensor, input: Tensor, of_weight: bool, of_bias: bool) -> tuple:
    """dweight and dbias where they are wanted, else None."""
    if not of_weight:
        acc = torch.promote_types(dz.dtype, torch.float32)
        return None, dz.sum(0, dtype=acc).to(dz.dtype) if of_bias else None
    dweight, dbias = linear_dweight(dz, input, of_bias)
    return dweight, dbias if of_bias else None


def check_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str] = ("weight", "bias")
) -> None:
    """Raises where a layer's arguments disagree."""
    name, bias_name = names
    if input.dtype not in KERNEL_DTYPES and input.dtype != torch.float64:
        raise TypeError(
            f"expected float32, bfloat16, float16 or float64 tensors, got {input.dtype}"
        )
    if weight.ndim != 2 or input.ndim == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name} must be [out, in] with in the last dimension of input, got {name}"
            f" {list(weight.shape)}, input {list(input.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{bias_name} must be {list(weight.shape[:1])}, got {list(bias.shape)}")
    for n, t in ((name, weight), (bias_name, bias)):
        if t is None:
            continue
        if t.device != input.device:
            raise ValueError(f"{n} is on {t.device}, input on {input.device}")
        if t.dtype != input.dtype:
            raise TypeError(f"{n} must have the dtype of input, {input.dtype}, got {t.dtype}")


def as_rows(input: Tensor) -> Tensor:
    """``input`` [..., in] as [rows, in]."""
    if input.ndim == 2:
        return input
    return input.reshape(input.shape[:-1].numel(), input.shape[-1])


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.linear`` with its activation in one pass.

    ``input`` [..., in], ``weight`` [out, in] and ``bias`` [out], of one dtype: float32, bfloat16 or
    float16 (float64: the reference answers), any strides. ``activation`` is None, "relu", "relu2",
    "gelu", "gelu_tanh" or "silu". Returns [..., out], contiguous. Up to 4 rows, a weight stored by
    columns (``weight.stride(0) == 1``) is read only where ``input`` is not 0: the rest is finite or
    not, but never touched. Under autocast the arguments are cast, as torch does. Raises ValueError
    for shapes, devices or names, TypeError for dtypes.
    """
    code = activations.code_of(activation)
    input, weight, bias = autocast(input, weight, bias)
    check_linear(input, weight, bias)
    rows = as_rows(input)
    if use_reference(backend, input.dtype):
        out = transform(rows, weight, bias, code, 0.0, None)[0]
    elif needs_grad(input, weight, bias):
        out = _Linear.apply(rows, weight, bias, code)
    else:
        out = linear_forward(rows, weight, bias, code, 0.0, None, False)[0]
    return out if input.ndim == 2 else out.view(*input.shape[:-1], weight.shape[0])


def project(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product with nothing to fuse, by whoever is faster: torch's cuBLAS on GPUs and oneDNN in 16
    bits on CPUs, this library's own product in float32 on CPUs."""
    plain = type(weight) in (Tensor, torch.nn.Parameter)  # And nothing quantized or sharded.
    wide = input.is_cpu and input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if wide and plain:
        return linear(input, weight, bias)
    return F.linear(input, weight, bias)


def linear_reference(*args, **options) -> Tensor:
    """The definition of ``linear``: plain, differentiable, any device and dtype."""
    return linear(*args, **options, backend="reference")
