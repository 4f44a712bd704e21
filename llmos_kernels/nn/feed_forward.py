"""The feed-forward block."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmos_kernels.nn.hooks import has_hooks
from llmos_kernels.nn.int8 import Int8Linear, activated
from llmos_kernels.ops._activations import code_of
from llmos_kernels.ops._dropout import check_dropout
from llmos_kernels.ops.feed_forward import feed_forward

_FUNCTIONS: dict[Callable, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.nn.functional.relu_: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
}
_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "none"}


class FeedForward(nn.Module):
    """``linear2(dropout(activation(linear1(x))))`` through ``llmos_kernels.feed_forward``.

    ``activation``: None, "relu", "relu2", "gelu", "gelu_tanh" or "silu". The state dict is that of
    the two linear layers inside ``nn.TransformerEncoderLayer``. Raises ValueError for another
    activation, or a ``dropout`` outside [0, 1).
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        activation: str | None = "relu",
        dropout: float = 0.0,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        code_of(activation)
        check_dropout(dropout)
        super().__init__()
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.linear1 = nn.Linear(d_model, dim_feedforward, **options)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **options)
        self.activation = activation
        self.dropout = dropout

    def forward(self, input: Tensor) -> Tensor:
        first, second = self.linear1, self.linear2
        hidden = activated(first, input, self.activation)
        if hidden is not None:
            return second(F.dropout(hidden, self.dropout, self.training))
        return feed_forward(
            input, first.weight, first.bias, second.weight, second.bias,
            self.activation, self.dropout, self.training,
        )  # fmt: skip

    def store_for_decode(self) -> None:
        """Store ``linear2.weight`` by columns, in place, that one to four rows through relu or relu2
        read only the columns they need. Values, shape and state dict stay as they are. Raises
        TypeError for an int8 weight.
        """
        if type(self.linear2) is Int8Linear:
            raise TypeError("store_for_decode is for floating point weights, linear2 is int8")
        store_by_columns(self.linear2.weight)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"


def store_by_columns(weight: Tensor) -> None:
    """Give ``weight`` [out, in] the strides (1, out); its values stay."""
    with torch.no_grad():
        weight.data = weight.data.mT.contiguous().mT


def activation_name(activation: Callable) -> str | None:
    """The name under which ``feed_forward`` knows a function or module; None where it does not."""
    if isinstance(activation, functools.partial) and activation.func is F.gelu:
        return _gelu_name(activation.keywords.get("approximate", "none"), activation.args)
    if isinstance(activation, nn.Module):
        if has_hooks(activation):
            return None
        if type(activation) is nn.GELU:
            return _gelu_name(activation.approximate)
        return _MODULES.get(type(activation))
    return _FUNCTIONS.get(activation)


def _gelu_name(approximate: str, args: tuple = ()) -> str | None:
    return None if args else {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
