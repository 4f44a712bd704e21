"""``linear``: a matrix product with its bias and activation; formulas in ``ops/_products.py``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels._registry import KERNEL_DTYPES, needs_grad, use_reference
from llmos_kernels.ops import _activations, _products
from llmos_kernels.ops._activations import NONE, RELU, keeps_input
from llmos_kernels.ops._autocast import autocast


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, activation):
        keep = keeps_input(activation)
        out, z = _products.forward(input, weight, bias, activation, 0.0, None, keep)
        kept = z if keep else out if activation == RELU else None
        ctx.save_for_backward(input, weight, bias, kept)
        ctx.activation = activation
        return out

    @staticmethod
    def backward(ctx, dout):
        input, weight, bias, kept = ctx.saved_tensors
        activation = ctx.activation
        if torch.is_grad_enabled():
            z = _products.transform(input, weight, bias, NONE, 0.0, None)[1]
            dz = dout * _products.slopes(z, activation, 0.0, None)
            return (*_products.linear_gradients(dz, input, weight, bias), None)
        dz = dout
        if kept is not None:
            dz = _products.activation_backward(dout, kept, activation, 0.0, None)
        of_input, of_weight, of_bias, _ = ctx.needs_input_grad
        dinput = _products.dinput(dz, weight, None, NONE, 0.0, None)[0] if of_input else None
        dweight, dbias = _products.parameter_gradients(dz, input, of_weight, of_bias)
        return dinput, dweight, dbias, None


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
    code = _activations.code_of(activation)
    input, weight, bias = autocast(input, weight, bias)
    check_linear(input, weight, bias)
    rows = as_rows(input)
    if use_reference(backend, input.dtype):
        out = _products.transform(rows, weight, bias, code, 0.0, None)[0]
    elif needs_grad(input, weight, bias):
        out = _Linear.apply(rows, weight, bias, code)
    else:
        out = _products.forward(rows, weight, bias, code, 0.0, None, False)[0]
    return out if input.ndim == 2 else out.view(*input.shape[:-1], weight.shape[0])


def project(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product with nothing to fuse, by whoever is faster: ``linear`` on CPUs at some sizes, else
    ``F.linear``."""
    plain = type(weight) in (Tensor, torch.nn.Parameter)  # And nothing quantized or sharded.
    if input.is_cpu and plain and not torch.is_autocast_enabled("cpu"):
        least, stop = _products.faster_between(input.dtype)
        if least <= input.numel() * weight.shape[0] < stop:
            return linear(input, weight, bias)
    return F.linear(input, weight, bias)


def linear_reference(*args, **options) -> Tensor:
    """The definition of ``linear``: plain, differentiable, any device and dtype."""
    return linear(*args, **options, backend="reference")
