"""RMS normalisations that models bring themselves, known by what they compute."""

import torch
from torch import Tensor, nn

from llmos_kernels._core import numerics
from llmos_kernels.ops.rms_norm import rms_norm_reference
from llmos_kernels.swap.replica import replica

_EPS = ("eps", "variance_epsilon", "epsilon")


def rms_norm_eps(module: nn.Module) -> str:
    """The attribute that holds the epsilon of an RMS normalisation; empty where it is none."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or len(module._parameters) != 1:
        return ""
    name = next((n for n in _EPS if isinstance(module.__dict__.get(n), float)), "")
    if not name or module._modules or module._buffers:
        return ""
    return name if all(_agrees(module, name, scale) for scale in (1.0, 1e-3)) else ""


def _agrees(module: nn.Module, eps: str, scale: float) -> bool:
    """Whether it is an RMS normalisation by the last dimension, also where epsilon decides."""
    copy = replica(module, dtype=torch.float32, device="cpu")
    copy.__dict__[eps] = 1e-6
    (weight,) = copy.parameters()
    width = len(weight)
    generator = numerics.generator(0)
    with torch.no_grad():
        weight.copy_(torch.randn(width, generator=generator))
        x = torch.randn(2, 3, width, generator=generator) * scale
        x[..., 0] += scale  # A mean that counts.
        for training in (False, True):
            try:
                y = copy.train(training)(x)
            except Exception:  # It is something else.
                return False
            wanted = rms_norm_reference(x.double(), (width,), weight.detach().double(), 1e-6)
            same = isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype
            if not same or not torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-6):
                return False
    return True
