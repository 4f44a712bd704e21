"""The reference, schema, autograd and checks that the ops LayerNorm and RMSNorm share.

The formulas are in ``ops/layer_norm.py``; ``center=False`` is RMSNorm, with mean 0 and no bias.
``rows`` are an input [..., *normalized_shape] as [rows, d].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmos_kernels._core.errors import ArgumentError, DtypeError
from llmos_kernels._core.registry import define, needs_grad
from llmos_kernels.ops._dropout import draw_seed, dropout_reference

__all__: list[str] = []


def add_dropped(
    x: Tensor, residual: Tensor, normalized_shape: Sequence[int], dropout_p: float, training: bool
) -> Tensor:
    """Return ``residual + dropout(x)`` by torch ops, with a newly drawn seed."""
    p = dropout_p if training else 0.0
    seed = draw_seed(x.device) if p else None
    return add_residual(x, residual, width_of(normalized_shape), p, seed)


def add_residual(x: Tensor, residual: Tensor, d: int, p: float, seed: Tensor | None) -> Tensor:
    """Return ``residual + dropout(x)``, in the dtype of both."""
    if seed is not None:
        x = dropout_reference(rows_of(x, d), seed, p).reshape(x.shape)
    return residual + x


def normalize(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, d: int, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    """Return ``y`` like ``h``, and stats: mean and rstd [2, rows], or rstd [1, rows] with RMS."""
    acc = torch.promote_types(h.dtype, torch.float32)
    rows = rows_of(h, d).to(acc)
    mean, rstd = _moments(rows, eps, center)
    y = (rows - mean if center else rows) * rstd
    if weight is not None:
        y = y * weight.flatten().to(acc)
    if bias is not None:
        y = y + bias.flatten().to(acc)
    stats = (mean, rstd) if center else (rstd,)
    return y.to(h.dtype).reshape(h.shape), torch.stack([s.flatten() for s in stats])


def _moments(rows: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """Return mean and rstd [rows, 1] of ``rows`` [rows, d]; the mean is 0 without ``center``."""
    mean = rows.mean(-1, keepdim=True) if center else rows.new_zeros(())
    variance = (rows - mean if center else rows).square().mean(-1, keepdim=True)
    return mean, torch.rsqrt(variance + eps)


def width_of(normalized_shape: Sequence[int]) -> int:
    """Return the number of elements of a row."""
    d = 1
    for size in normalized_shape:
        d *= size
    return d


def rows_of(x: Tensor, d: int) -> Tensor:
    """Return ``x`` as rows [rows, d]; no rows where d is 0."""
    return x.reshape(x.numel() // d if d else 0, d)


def _forward_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, d: int, eps: float, center: bool
) -> tuple[Tensor, Tensor]:
    y, stats = normalize(x, weight, bias, d, eps, center)
    return y.contiguous(), stats


def _add_forward_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    d: int,
    eps: float,
    center: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    h = add_residual(x, residual, d, dropout_p, seed).contiguous()
    y, stats = _forward_reference(h, weight, bias, d, eps, center)
    return y, h, stats


def _gradients(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    d: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dresidual in the dtype of ``h``, dweight and dbias in the accumulation dtype.

    ``mean`` is None for RMS.
    """
    acc = rstd.dtype
    x_hat = rows_of(h, d).to(acc)
    x_hat = (x_hat if mean is None else x_hat - mean) * rstd
    dy = rows_of(dy, d).to(acc)
    g = dy if weight is None else dy * weight.flatten().to(acc)
    dresidual = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    if mean is not None:
        dresidual = dresidual - g.mean(-1, keepdim=True)
    dresidual = dresidual * rstd
    if dh is not None:
        dresidual = dresidual + rows_of(dh, d).to(acc)
    return dresidual.to(h.dtype), (dy * x_hat).sum(0), dy.sum(0)


def norm_backward_reference(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    d: int,
    center: bool,
    dropout_p: float,
    seed: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dresidual, dx, dweight and dbias.

    dweight and dbias are empty where not wanted. dx is empty without dropout: it equals dresidual.
    """
    mean = stats[0, :, None] if center else None
    dresidual, dweight, dbias = _gradients(dy, dh, h, weight, mean, stats[-1, :, None], d)
    dtype = stats.dtype if weight is None else weight.dtype
    dx = dropout_reference(dresidual, seed, dropout_p) if dropout_p and seed is not None else None
    return (
        dresidual.reshape(h.shape).contiguous(),
        h.new_empty(0) if dx is None else dx.reshape(h.shape).contiguous(),
        dweight.to(dtype) if weight_grad else h.new_empty(0, dtype=dtype),
        dbias.to(dtype) if bias_grad else h.new_empty(0, dtype=dtype),
    )


def _empty_stats(x: Tensor, d: int, center: bool) -> Tensor:
    """Return statistics of the right shape and dtype, not initialised."""
    rows = x.numel() // d if d else 0
    return x.new_empty(
        (2 if center else 1, rows), dtype=torch.promote_types(x.dtype, torch.float32)
    )


def _backward_fake(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    d: int,
    center: bool,
    dropout_p: float,
    seed: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = stats.dtype if weight is None else weight.dtype
    return (
        h.new_empty(h.shape),
        h.new_empty(h.shape if dropout_p else 0),
        h.new_empty(d if weight_grad else 0, dtype=dtype),
        h.new_empty(d if bias_grad else 0, dtype=dtype),
    )


_forward = define(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, SymInt d, float eps, bool center)"
    " -> (Tensor y, Tensor stats)",
    reference=_forward_reference,
    fake=lambda x, weight, bias, d, eps, center: (
        x.new_empty(x.shape),
        _empty_stats(x, d, center),
    ),
    triton="norm.layer_norm:forward",
)

_add_forward = define(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, SymInt d,"
    " float eps, bool center, float dropout_p, Tensor? seed) -> (Tensor y, Tensor h, Tensor stats)",
    reference=_add_forward_reference,
    fake=lambda x, residual, weight, bias, d, eps, center, dropout_p, seed: (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        _empty_stats(x, d, center),
    ),
    triton="norm.layer_norm:add_forward",
)

_backward = define(
    "layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor stats, SymInt d,"
    " bool center, float dropout_p, Tensor? seed, bool weight_grad, bool bias_grad)"
    " -> (Tensor dresidual, Tensor dx, Tensor dweight, Tensor dbias)",
    reference=norm_backward_reference,
    fake=_backward_fake,
    triton="norm.layer_norm_backward:backward",
)


def gradients_of(
    ctx: Any,
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dresidual, dx, dweight and dbias; if grad is on, by differentiable torch ops."""
    weight_grad = weight is not None and weight.requires_grad
    bias_grad = bias is not None and bias.requires_grad
    if torch.is_grad_enabled():
        acc = torch.promote_types(h.dtype, torch.float32)
        mean, rstd = _moments(rows_of(h, ctx.d).to(acc), ctx.eps, ctx.center)
        dresidual, dweight, dbias = _gradients(
            dy, dh, h, weight, mean if ctx.center else None, rstd, ctx.d
        )
        dx = dresidual if seed is None else dropout_reference(dresidual, seed, ctx.dropout_p)
        dresidual, dx = dresidual.reshape(h.shape), dx.reshape(h.shape)
    else:
        dresidual, dx, dweight, dbias = _backward(
            dy, dh, h, weight, stats, ctx.d, ctx.center, ctx.dropout_p, seed, weight_grad, bias_grad
        )
        dx = dresidual if seed is None else dx
    return (
        dresidual,
        dx,
        dweight.to(weight.dtype).view_as(weight) if weight is not None and weight_grad else None,
        dbias.to(bias.dtype).view_as(bias) if bias is not None and bias_grad else None,
    )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        d: int,
        eps: float,
        center: bool,
    ) -> Tensor:
        y, stats = _forward(x, weight, bias, d, eps, center)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.d, ctx.eps, ctx.center, ctx.dropout_p = d, eps, center, 0.0
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats = ctx.saved_tensors
        dx, _, dweight, dbias = gradients_of(ctx, dy, None, x, weight, bias, stats, None)
        return dx, dweight, dbias, None, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        d: int,
        eps: float,
        center: bool,
        dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, h, stats = _add_forward(x, residual, weight, bias, d, eps, center, dropout_p, seed)
        ctx.save_for_backward(h, weight, bias, stats, seed)
        ctx.set_materialize_grads(False)
        ctx.d, ctx.eps, ctx.center, ctx.dropout_p = d, eps, center, dropout_p
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # Only h is used: the norm and its parameters get no gradient.
            if dh is None:
                return (None,) * 9
            seed, p = ctx.saved_tensors[-1], ctx.dropout_p
            rows = rows_of(dh, ctx.d)
            dx = dh if seed is None else dropout_reference(rows, seed, p).reshape(dh.shape)
            return dx, dh, None, None, None, None, None, None, None
        dresidual, dx, dweight, dbias = gradients_of(ctx, dy, dh, *ctx.saved_tensors)
        return dx, dresidual, dweight, dbias, None, None, None, None, None


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, d: int, eps: float, center: bool
) -> Tensor:
    """Return LayerNorm or RMSNorm of rows of ``d`` elements, through autograd if it is needed."""
    if needs_grad(x, weight, bias):
        return _Norm.apply(x, weight, bias, d, eps, center)
    return _forward(x, weight, bias, d, eps, center)[0]


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    d: int,
    eps: float,
    center: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return ``norm`` of h and h = residual + dropout(x), through autograd if it is needed."""
    seed = draw_seed(x.device) if dropout_p else None
    if needs_grad(x, residual, weight, bias):
        return _AddNorm.apply(x, residual, weight, bias, d, eps, center, dropout_p, seed)
    return _add_forward(x, residual, weight, bias, d, eps, center, dropout_p, seed)[:2]


def check_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> int:
    """Return the number of elements of a row, or raise ArgumentError or DtypeError."""
    shape = tuple(normalized_shape)
    if not shape or input.shape[-len(shape) :] != shape:
        raise ArgumentError(
            f"normalized_shape {list(shape)} must be the last dimensions of input,"
            f" got input {list(input.shape)}"
        )
    dtype, device = input.dtype, input.device
    for parameter in (weight, bias):
        if parameter is not None and not (
            parameter.shape == shape and parameter.dtype is dtype and parameter.device == device
        ):
            _check_parameter("weight" if parameter is weight else "bias", parameter, shape, input)
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        raise DtypeError(f"bias must have weight's dtype {weight.dtype}, got {bias.dtype}")
    return shape[0] if len(shape) == 1 else width_of(shape)


def _check_parameter(name: str, parameter: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    """Raise where ``parameter`` has the wrong shape, device or dtype for ``input``."""
    if parameter.shape != shape:
        raise ArgumentError(f"{name} must have shape {list(shape)}, got {list(parameter.shape)}")
    if parameter.device != input.device:
        raise ArgumentError(f"{name} is on {parameter.device}, input on {input.device}")
    dtype = parameter.dtype
    if dtype != input.dtype and (dtype != torch.float32 or input.dtype == torch.float64):
        raise DtypeError(f"{name} must be {input.dtype} or float32, got {dtype}")


def check_residual(input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in their common dtype, or raise ArgumentError where shape or device differ."""
    if residual.shape != input.shape:
        raise ArgumentError(
            f"residual must have the shape of input, {list(input.shape)},"
            f" got {list(residual.shape)}"
        )
    if residual.device != input.device:
        raise ArgumentError(f"residual is on {residual.device}, input on {input.device}")
    if residual.dtype != input.dtype:
        common = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(common), residual.to(common)
    return input, residual


def autocasts(input: Tensor) -> bool:
    """Return True if autocast runs a norm of ``input`` in float32, as torch does on CUDA alone."""
    return input.is_cuda and torch.is_autocast_enabled("cuda") and input.dtype != torch.float64


def as_float32(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors in float32; None stays None."""
    return tuple(t if t is None else t.float() for t in tensors)
