"""The activations of feed-forward blocks, and what their gradients need.

Each is torch's: relu, relu2 (So et al. 2021, arXiv:2109.08668), gelu and gelu_tanh (Hendrycks and
Gimpel 2016, arXiv:1606.08415), silu. Under autograd one tensor is kept of an activation's input z
and result y: for relu y itself, whose sign is the mask, for the others z. Kernels know an
activation by its place in ``NAMES``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("none", "relu", "relu2", "gelu", "gelu_tanh", "silu")
NONE, RELU, RELU2, GELU, GELU_TANH, SILU = range(len(NAMES))

_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def code_of(activation: str | None) -> int:
    """The place of ``activation`` in ``NAMES``; None is "none". Raises ValueError for other names."""
    name = "none" if activation is None else activation
    if name not in NAMES:
        raise ValueError(f"activation must be None or one of {', '.join(NAMES)}, got {name!r}")
    return NAMES.index(name)


def keeps_input(activation: int) -> bool:
    """Whether it is z that a gradient needs."""
    return activation > RELU


def activate(z: Tensor, activation: int) -> Tensor:
    """The activation of ``z``, by torch ops."""
    if activation == RELU:
        return F.relu(z)
    if activation == RELU2:
        return F.relu(z).square()
    if activation == GELU:
        return F.gelu(z)
    if activation == GELU_TANH:
        return F.gelu(z, approximate="tanh")
    return F.silu(z) if activation == SILU else z


def derivative(kept: Tensor, activation: int) -> Tensor:
    """The derivative of the activation, from what is kept; by torch ops, differentiable again."""
    z = kept
    if activation == RELU:
        return (~(z <= 0)).to(z.dtype)  # NaN passes, as in torch.
    if activation == RELU2:
        return 2 * F.relu(z)
    if activation == GELU:
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
    if activation == GELU_TANH:
        t = torch.tanh(_TANH_SCALE * (z + _TANH_CUBE * z**3))
        slope = _TANH_SCALE * (1 + 3 * _TANH_CUBE * z.square())
        return 0.5 * (1 + t) + 0.5 * z * (1 - t.square()) * slope
    if activation == SILU:
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    return torch.ones_like(z)
