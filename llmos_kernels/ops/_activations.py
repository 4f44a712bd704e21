"""The activations of linear layers, and the tensors that their gradients need.

    relu(z) = max(z, 0)             relu2(z) = max(z, 0)^2
    gelu(z) = z Phi(z)              gelu_tanh(z) = z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2
    silu(z) = z / (1 + exp(-z))     Phi: the distribution function of the standard normal

So et al. 2021, arXiv:2109.08668 (relu2); Hendrycks and Gimpel 2016, arXiv:1606.08415 (the gelus,
silu). For the gradient one tensor is saved of the pre-activation z and the result y: y for relu,
whose sign is the mask, z for the others. Kernels take an activation as its index in ``NAMES``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__: list[str] = []

NAMES = ("none", "relu", "relu2", "gelu", "gelu_tanh", "silu")
NONE, RELU, RELU2, GELU, GELU_TANH, SILU = range(len(NAMES))

_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def code_of(activation: str | None) -> int:
    """Return the index of ``activation`` in ``NAMES``; None is "none". Others raise ValueError."""
    name = "none" if activation is None else activation
    if name not in NAMES:
        raise ValueError(f"activation must be None or one of {', '.join(NAMES)}, got {name!r}")
    return NAMES.index(name)


def keeps_input(activation: int) -> bool:
    """Return True if the gradient needs the pre-activation z, False if y or nothing."""
    return activation > RELU


def activate(z: Tensor, activation: int) -> Tensor:
    """Return the activation of ``z``, by differentiable torch ops."""
    if activation == RELU:
        return F.relu(z)
    if activation == RELU2:
        return F.relu(z).square()
    if activation == GELU:
        return F.gelu(z)
    if activation == GELU_TANH:
        return F.gelu(z, approximate="tanh")
    return F.silu(z) if activation == SILU else z


def derivative(saved: Tensor, activation: int) -> Tensor:
    """Return the activation's derivative from its saved tensor, by differentiable torch ops."""
    z = saved
    if activation == RELU:
        return (~(z <= 0)).to(z.dtype)  # NaN gives 1, as in torch.
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
