"""A linear layer with its activation in the product's epilogue.

    z = input weight^T + bias,   y = activation(z)

z is rounded to the dtype of ``input`` before the activation, as in torch; sums are float32. For the
gradient one tensor is saved besides the arguments: y for relu, z for the other activations:

    dz = dy activation'(saved),   dinput = dz weight,   dweight = dz^T input,   dbias = sum(dz)

References and ops are in ``ops/_products.py``; ``ops/_product_policy.py`` says who computes a
product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from llmos_kernels._core.errors import ArgumentError, DtypeError
from llmos_kernels._core.registry import KERNEL_DTYPES, needs_grad, use_reference
from llmos_kernels.ops import _activations, _products
from llmos_kernels.ops._activations import NONE, RELU, keeps_input
from llmos_kernels.ops._autocast import autocast
from llmos_kernels.ops._product_measurements import FORWARD
from llmos_kernels.ops._product_policy import TORCH, choose

__all__ = ["linear", "linear_reference"]

#: The types of a tensor that is neither quantized nor sharded.
PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: int,
        layer: bool,
        provider: str | None,
    ) -> Tensor:
        save_z = keeps_input(activation)
        out, z = _products.forward(
            input, weight, bias, activation, 0.0, None, save_z, layer, provider
        )
        saved = z if save_z else out if activation == RELU else None
        of_input, of_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(input if of_weight else None, weight if of_input else None, saved)
        # Only second derivatives need the parameters, and of them only the graph.
        ctx.parameters = (weight, bias) if save_z else ()
        ctx.activation, ctx.layer = activation, layer
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, saved = ctx.saved_tensors
        activation, layer = ctx.activation, ctx.layer
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dz = dout
            if saved is not None:
                if ctx.parameters:
                    saved = saved + _products.linear_graph(input, *ctx.parameters)
                dz = dout * _products.slopes(saved, activation, 0.0, None)
            gradients = _products.linear_gradients(dz, input, weight, of_bias, dout.dtype)
            return *gradients, None, None, None
        dz = dout
        if saved is not None:
            dz = _products.activation_backward(dout, saved, activation, 0.0, None)
        dinput = None
        if of_input:
            dinput = _products.dinput(dz, weight, None, NONE, 0.0, None, layer)[0]
        dweight, dbias = _products.parameter_gradients(dz, input, of_weight, of_bias, layer)
        return dinput, dweight, dbias, None, None, None


class Activation(torch.autograd.Function):
    """dropout(activation(z)): as a step of its own it saves z, or for relu its result, alone."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, activation: int, dropout_p: float, seed: Tensor | None
    ) -> Tensor:
        out = _products.activation_forward(z, activation, dropout_p, seed)
        ctx.save_for_backward(z if keeps_input(activation) else out, seed)
        ctx.activation, ctx.dropout_p = activation, dropout_p
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved, seed = ctx.saved_tensors
        epilogue = ctx.activation, ctx.dropout_p, seed
        if torch.is_grad_enabled():
            dz = dout * _products.slopes(saved, *epilogue)
            return dz.to(dout.dtype), None, None, None
        return _products.activation_backward(dout, saved, *epilogue), None, None, None


def frozen_linear(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return dropout(activation(rows weight^T + bias)) for a weight that gets no gradient.

    The two steps save what torch's do: the pre-activation, and not the input.
    """
    z = _Linear.apply(rows, weight, bias, NONE, False, None)
    if activation == NONE and seed is None:
        return z
    return Activation.apply(z, activation, dropout_p, seed)


def check_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str] = ("weight", "bias")
) -> None:
    """Raise ArgumentError or DtypeError where the arguments of a linear layer disagree.

    ``names`` are those of ``weight`` and ``bias`` in the message.
    """
    name, bias_name = names
    if input.dtype not in KERNEL_DTYPES and input.dtype != torch.float64:
        raise DtypeError(
            f"expected float32, bfloat16, float16 or float64 tensors, got {input.dtype}"
        )
    if weight.ndim != 2 or input.ndim == 0 or input.shape[-1] != weight.shape[1]:
        raise ArgumentError(
            f"{name} must be [out, in] with in the last dimension of input, got {name}"
            f" {list(weight.shape)}, input {list(input.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError(f"{bias_name} must be {list(weight.shape[:1])}, got {list(bias.shape)}")
    for n, t in ((name, weight), (bias_name, bias)):
        if t is None:
            continue
        if t.device != input.device:
            raise ArgumentError(f"{n} is on {t.device}, input on {input.device}")
        if t.dtype != input.dtype:
            raise DtypeError(f"{n} must have the dtype of input, {input.dtype}, got {t.dtype}")


def as_rows(input: Tensor) -> Tensor:
    """Return ``input`` [..., in] as [rows, in]."""
    if input.ndim == 2:
        return input
    return input.flatten(0, -2) if input.ndim > 1 else input.unsqueeze(0)


def _compute(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    backend: str | None,
    layer: bool = False,
    provider: str | None = None,
) -> Tensor:
    """Return the checked linear layer; ``_products.forward`` explains the last two arguments."""
    check_linear(input, weight, bias)
    rows = as_rows(input)
    if use_reference(backend, input.dtype):
        out = _products.transform(rows, weight, bias, activation, 0.0, None)[0]
    elif needs_grad(input, weight, bias):
        if keeps_input(activation) and not weight.requires_grad:
            out = frozen_linear(rows, weight, bias, activation)
        else:
            out = _Linear.apply(rows, weight, bias, activation, layer, provider)
    else:
        out = _products.forward(rows, weight, bias, activation, 0.0, None, False, layer, provider)[
            0
        ]
    return out if input.ndim == 2 else out.view(*input.shape[:-1], weight.shape[0])


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return ``activation(torch.nn.functional.linear(input, weight, bias))``, in one pass.

    For at most 4 rows of input, a weight stored by columns (``weight.stride(0) == 1``) is read only
    where ``input`` is not 0: an infinity or NaN that is not read stays unseen.

    Args:
        input: [..., in], float32, bfloat16 or float16 (float64: the reference computes it), any
            strides.
        weight: [out, in], of the dtype of ``input``, any strides.
        bias: [out], of the dtype of ``input``, or None.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh" or "silu".
        backend: "reference" for the plain torch definition, else None.

    Returns:
        [..., out], contiguous, of the dtype of ``input``. Under autocast the arguments are cast to
        its dtype first, as torch does.

    Raises:
        ValueError: Shapes or devices disagree, or the activation or backend has no such name.
        TypeError: A dtype is not supported, or the dtypes differ. Both are RuntimeErrors too where
            torch raises those.

    Example:
        >>> y = linear(torch.randn(8, 128, 768), torch.randn(3072, 768), activation="gelu")
        >>> y.shape
        torch.Size([8, 128, 3072])

    The activations' sources are named in ``ops/_activations.py``.
    """
    code = _activations.code_of(activation)
    input, weight, bias = autocast(input, weight, bias)
    return _compute(input, weight, bias, code, backend)


def project(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a plain linear layer: by our kernels or torch's, as the policy says for its size.

    Takes what ``torch.nn.functional.linear`` takes. Nested tensors, quantized and sharded ones, and
    calls under CPU autocast, are torch's.
    """
    if (
        type(weight) not in PLAIN_TENSORS
        or type(input) not in PLAIN_TENSORS
        or input.is_nested
        or (input.is_cpu and torch.is_autocast_enabled("cpu"))
    ):
        return F.linear(input, weight, bias)
    if _products.is_traced(input):
        if not input.is_cpu:  # A compiler can fuse and tune torch's.
            return F.linear(input, weight, bias)
        return _compute(input, weight, bias, NONE, None, True)
    width, depth = weight.shape
    rows = input.numel() // depth if depth else 0
    recorded = needs_grad(input, weight, bias)
    provider = choose(FORWARD, input.dtype, input.device, rows, depth, width, True, recorded)
    if provider == TORCH:
        return F.linear(input, weight, bias)
    return _compute(input, weight, bias, NONE, None, True, provider)


def linear_reference(*args: Any, **options: Any) -> Tensor:
    """Return ``linear`` by its definition, in plain, differentiable torch ops.

    It runs on any device, and in float64 its result is exact.

    Args:
        *args: as ``linear``, without ``backend``.
        **options: as ``linear``, without ``backend``.

    Returns:
        [..., out], of the dtype of ``input``.
    """
    return linear(*args, **options, backend="reference")
