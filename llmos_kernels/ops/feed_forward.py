"""The feed-forward block: two linear layers with an activation and dropout between them.

    h   = dropout(activation(input weight1^T + bias1))
    out = h weight2^T + bias2

Vaswani et al. 2017, arXiv:1706.03762 (with relu). Between input and output one tensor is saved for
the gradient: h for relu, the pre-activation for the others. With f the dropout factors (0 or
1 / (1 - p)):

    dz = (dout weight2) f activation',   dinput = dz weight1
    dweight2 = dout^T h,   dbias2 = sum(dout),   dweight1 = dz^T input,   dbias1 = sum(dz)

References and ops are in ``ops/_products.py``; ``ops/_product_policy.py`` says who computes a
product.
"""

from typing import Any

import torch
from torch import Tensor

from llmos_kernels._core.errors import ArgumentError
from llmos_kernels._core.registry import needs_grad, use_reference
from llmos_kernels.ops import _products
from llmos_kernels.ops._activations import NONE, code_of, keeps_input
from llmos_kernels.ops._autocast import autocast
from llmos_kernels.ops._dropout import check_dropout, draw_seed
from llmos_kernels.ops.linear import as_rows, check_linear, frozen_linear, linear

__all__ = ["feed_forward", "feed_forward_reference"]


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        activation: int,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        save_z = keeps_input(activation)
        h, z = _products.forward(input, weight1, bias1, activation, dropout_p, seed, save_z)
        ctx.save_for_backward(input, weight1, weight2, z if save_z else h, seed)
        ctx.bias1 = bias1  # Only second derivatives need it, and of it only the graph.
        ctx.activation, ctx.dropout_p = activation, dropout_p
        return _products.forward(h, weight2, bias2, NONE, 0.0, None, False)[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        input, weight1, weight2, saved, seed = ctx.saved_tensors
        epilogue = ctx.activation, ctx.dropout_p, seed
        of_input, of_weight1, of_bias1, of_weight2, of_bias2, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            graph = _products.linear_graph(input, weight1, ctx.bias1)
            if keeps_input(ctx.activation):
                slopes = _products.slopes(saved + graph, *epilogue)
                h = _products.activate_rows(saved + graph, *epilogue)
            else:
                slopes = _products.slopes(saved, *epilogue)
                h = (saved + slopes * graph).to(saved.dtype)
            dtype = dout.dtype
            dh, *second = _products.linear_gradients(dout, h, weight2, of_bias2, dtype)
            dz: Tensor = dh * slopes  # type: ignore[operator]
            first = _products.linear_gradients(dz, input, weight1, of_bias1, dtype)
            return *first, *second, None, None, None
        h = saved
        if of_weight2 and keeps_input(ctx.activation):
            h = _products.activation_forward(saved, *epilogue)
        dweight2, dbias2 = _products.parameter_gradients(dout, h, of_weight2, of_bias2)
        dinput = dweight1 = dbias1 = None
        if of_input or of_weight1 or of_bias1:
            dz, dbias1 = _products.dinput(dout, weight2, saved, *epilogue)
            dweight1 = _products.parameter_gradients(dz, input, of_weight1, False)[0]
            if of_input:
                dinput = _products.dinput(dz, weight1, None, NONE, 0.0, None)[0]
        dbias1 = dbias1 if of_bias1 else None
        return dinput, dweight1, dbias1, dweight2, dbias2, None, None, None


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str | None = "relu",
    dropout_p: float = 0.0,
    training: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return ``linear(dropout(activation(linear(input, weight1, bias1))), weight2, bias2)``, fused.

    For at most 4 rows of input with relu or relu2, a ``weight2`` stored by columns
    (``nn.FeedForward.store_for_decode``) is read only in the columns whose hidden value is not 0 in
    every row: an infinity or NaN in a column that is not read stays unseen.

    Args:
        input: [..., d_model], float32, bfloat16 or float16 (float64: the reference computes it),
            any strides.
        weight1: [hidden, d_model], of the dtype of ``input`` like all that follow.
        bias1: [hidden], or None.
        weight2: [d_model, hidden].
        bias2: [d_model], or None.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh" or "silu".
        dropout_p: The probability, in [0, 1), that a hidden value is set to 0.
        training: Whether dropout is applied.
        backend: "reference" for the plain torch definition, else None.

    Returns:
        [..., d_model], contiguous, of the dtype of ``input``. Under autocast the arguments are cast
        to its dtype first, as torch does.

    Raises:
        ValueError: Shapes or devices disagree, the activation or backend has no such name, or
            ``dropout_p`` is not in [0, 1).
        TypeError: A dtype is not supported, or the dtypes differ.

    Example:
        >>> x, up, down = torch.randn(8, 128, 768), torch.randn(3072, 768), torch.randn(768, 3072)
        >>> feed_forward(x, up, None, down, None, "gelu").shape
        torch.Size([8, 128, 768])

    Vaswani et al. 2017, arXiv:1706.03762.
    """
    code = code_of(activation)
    check_dropout(dropout_p)
    input, weight1, bias1, weight2, bias2 = autocast(input, weight1, bias1, weight2, bias2)
    check_linear(input, weight1, bias1, ("weight1", "bias1"))
    hidden = weight1.shape[0]
    if weight2.ndim != 2 or weight2.shape[1] != hidden:
        raise ArgumentError(f"weight2 must be [out, {hidden}], got {list(weight2.shape)}")
    check_linear(weight1.mT, weight2, bias2, ("weight2", "bias2"))
    p = dropout_p if training else 0.0
    seed = draw_seed(input.device) if p else None
    rows = as_rows(input)
    if use_reference(backend, input.dtype):
        h = _products.transform(rows, weight1, bias1, code, p, seed)[0]
        out = _products.transform(h, weight2, bias2, NONE, 0.0, None)[0]
    elif needs_grad(input, weight1, bias1, weight2, bias2):
        if weight1.requires_grad:
            out = _FeedForward.apply(rows, weight1, bias1, weight2, bias2, code, p, seed)
        else:
            h = frozen_linear(rows, weight1, bias1, code, p, seed)
            out = linear(h, weight2, bias2)
    else:
        h = _products.forward(rows, weight1, bias1, code, p, seed, False)[0]
        out = _products.forward(h, weight2, bias2, NONE, 0.0, None, False)[0]
    return out if input.ndim == 2 else out.view(*input.shape[:-1], weight2.shape[0])


def feed_forward_reference(*args: Any, **options: Any) -> Tensor:
    """Return ``feed_forward`` by its definition, in plain, differentiable torch ops.

    It runs on any device, and in float64 its result is exact.

    Args:
        *args: as ``feed_forward``, without ``backend``.
        **options: as ``feed_forward``, without ``backend``.

    Returns:
        [..., d_model], of the dtype of ``input``.
    """
    return feed_forward(*args, **options, backend="reference")
