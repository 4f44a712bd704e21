"""The feed-forward block of the Transformer, and the activations that it can fuse."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmos_kernels.nn.fusible import is_fusible
from llmos_kernels.nn.int8 import Int8Linear, activated
from llmos_kernels.ops._activations import activate, code_of
from llmos_kernels.ops._dropout import check_dropout
from llmos_kernels.ops.feed_forward import feed_forward
from llmos_kernels.ops.linear import PLAIN_TENSORS

#: The names that ``feed_forward`` has for functions and for classes of modules.
_FUNCTIONS: dict[Callable, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.nn.functional.relu_: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
}
_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "none"}


class FeedForward(nn.Module):
    """``linear2(dropout(activation(linear1(input))))`` through ``llmos_kernels.feed_forward``.

    The state dict is that of the two linear layers of ``nn.TransformerEncoderLayer``.

    Args:
        d_model: the width of input and output.
        dim_feedforward: the width between the layers.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh" or "silu".
        dropout: the probability of dropping an element between the layers in training.
        bias: whether the layers have a bias.
        device: of the parameters.
        dtype: of the parameters.

    Returns:
        ``forward(input)`` takes and returns [..., d_model].

    Raises:
        ValueError: another activation, or a ``dropout`` outside [0, 1).

    Example:
        >>> FeedForward(512, 2048)(torch.randn(8, 128, 512)).shape
        torch.Size([8, 128, 512])
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        activation: str | None = "relu",
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        code_of(activation)
        check_dropout(dropout)
        super().__init__()
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.linear1 = nn.Linear(d_model, dim_feedforward, **options)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **options)
        self.activation = activation
        self.dropout = dropout

    def forward(self, input: Tensor) -> Tensor:
        first, second = self.linear1, self.linear2
        hidden = activated(first, input, self.activation)
        if hidden is None and (input.is_nested or type(input) not in PLAIN_TENSORS):
            hidden = activate(first(input), code_of(self.activation))
        if hidden is not None:
            return second(F.dropout(hidden, self.dropout, self.training))
        return feed_forward(
            input,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            self.activation,
            self.dropout,
            self.training,
        )

    def store_for_decode(self) -> None:
        """Store ``linear2.weight`` by columns, in place, for inputs of one to four rows.

        After relu or relu2 many hidden values are 0. Their columns are not read then. Values, shape
        and state dict stay as they are.

        Raises:
            TypeError: the weight is int8.
        """
        if type(self.linear2) is Int8Linear:
            raise TypeError("store_for_decode is for floating point weights, linear2 is int8")
        store_by_columns(self.linear2.weight)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"


def store_by_columns(weight: Tensor) -> None:
    """Give ``weight`` [out, in] the strides (1, out), in place. Its values stay as they are."""
    with torch.no_grad():
        weight.data = weight.data.mT.contiguous().mT


def activation_name(activation: Callable) -> str | None:
    """Return the name that ``feed_forward`` has for a function or module, or None."""
    if isinstance(activation, functools.partial) and activation.func is F.gelu:
        return _gelu_name(activation.keywords.get("approximate", "none"), activation.args)
    if isinstance(activation, nn.Module):
        if not is_fusible(activation):
            return None
        if type(activation) is nn.GELU:
            return _gelu_name(activation.approximate)
        return _MODULES.get(type(activation))
    return _FUNCTIONS.get(activation)


def _gelu_name(approximate: str, args: tuple[Any, ...] = ()) -> str | None:
    return None if args else {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
