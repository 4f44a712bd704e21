"""RMS norms that models define themselves, recognised by what they compute."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels._core import numerics
from llmos_kernels.ops.linear import PLAIN_TENSORS
from llmos_kernels.ops.rms_norm import rms_norm, rms_norm_reference
from llmos_kernels.swap.calls import ModuleCall, set_training
from llmos_kernels.swap.code import has_branches, has_slices
from llmos_kernels.swap.constants import Constants, Reads, constants, have_changed
from llmos_kernels.swap.forwards import side_effect
from llmos_kernels.swap.generated_class import GeneratedClass, generate_class
from llmos_kernels.swap.replica import replica
from llmos_kernels.swap.rules.rule import Candidate, Match, Rule, example_rows, tensor_options

#: The names that models give to epsilon.
_EPSILON_NAMES = ("eps", "variance_epsilon", "epsilon")
#: The sizes of the numbers on which an RMS norm is recognised. At 1e-3 the result depends on
#: epsilon; a bound may show far from 1 alone. Squares of 1e6 are still far from float32's limit.
_SCALES = (1.0, 1e-3, 1e6)


class FusedRMSNorm(GeneratedClass):
    """An RMS norm of a model, with one parameter ``weight`` [d] and an epsilon.

    An input [..., d] of another dtype than the weight, and under autocast any input that is not
    float32, go to the original forward: each model has its own way to mix dtypes.
    """

    weight: Tensor
    _epsilon_name: str
    #: What the original forward branches by.
    _constants: Constants

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given, weight = (*args, *kwargs.values()), self.weight
        plain = all(type(t) in PLAIN_TENSORS for t in (*given, weight))
        plain = plain and not (kwargs and self._first_argument not in kwargs)
        plain = plain and not (self._constants and have_changed(self, self._constants))
        if plain and len(given) == 1 and not given[0].is_nested and given[0].dtype == weight.dtype:
            (x,) = given
            if x.dtype == torch.float32 or not torch.is_autocast_enabled(x.device.type):
                return rms_norm(x, weight.shape, weight, getattr(self, self._epsilon_name))
        return self._replaced.forward(self, *args, **kwargs)


@functools.cache
def fused_rms_norm(replaced: type, epsilon_name: str, constants: Constants = ()) -> type:
    """Return the drop-in for ``replaced``, whose instances hold epsilon in ``epsilon_name``.

    ``constants`` are what its own forward branches by.
    """
    made_by = (fused_rms_norm, (replaced, epsilon_name, constants))
    members = {"_epsilon_name": epsilon_name, "_constants": constants}
    return generate_class(FusedRMSNorm, replaced, made_by, **members)


class ModelRMSNormRule(Rule):
    """Swaps RMS norms of any class, such as ``LlamaRMSNorm``."""

    def match(self, module: nn.Module) -> Match | None:
        cls: Any = type(module)
        name = epsilon_name(module)
        if not name:
            return None
        return Match(fused_rms_norm(cls, name, constants(module)))

    def example_calls(
        self, candidate: Candidate, size: tuple[int, int] | None = None
    ) -> list[ModuleCall]:
        """Return one call, with an input of shape [rows, d]."""
        width = len(next(candidate.module.parameters()))
        options = tensor_options(candidate.module)
        return [ModuleCall((torch.randn(example_rows(size), width, **options),))]


def epsilon_name(module: nn.Module) -> str:
    """Return the attribute that holds the epsilon of an RMS norm; empty for other modules.

    Copies of ``module`` run six times, on random numbers.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or len(module._parameters) != 1:
        return ""
    attributes = module.__dict__
    name = next((n for n in _EPSILON_NAMES if isinstance(attributes.get(n), float)), "")
    if not name or module._modules or module._buffers:
        return ""
    if side_effect(module) or has_slices(module):  # A slice may show in long inputs alone.
        return ""
    return name if all(_is_rms_norm(module, name, scale) for scale in _SCALES) else ""


def _is_rms_norm(module: nn.Module, epsilon: str, scale: float) -> bool:
    """Return whether ``module`` computes an RMS norm over the last dimension.

    Args:
        module: the module.
        epsilon: the name of its epsilon, which is set to 1e-6 in the copy that runs.
        scale: the size of the input.
    """
    copy = replica(module, dtype=torch.float32, device="cpu")
    copy.__dict__[epsilon] = 1e-6
    (weight,) = copy.parameters()
    width = len(weight)
    generator = numerics.generator(0)
    with torch.no_grad():
        options: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        weight.copy_(torch.randn(width, **options))
        x = torch.randn(2, 3, width, **options) * scale
        x[..., 0] += scale  # The mean is not 0, so that a norm that subtracts it differs.
        for training in (False, True):
            try:
                set_training(copy, training)
                with Reads() as reads:
                    y = copy(x)
            except Exception:  # A module of another kind may raise anything.
                return False
            if reads.any_read and has_branches(module):  # It may decide by the shape.
                return False
            expected = rms_norm_reference(x.double(), (width,), weight.detach().double(), 1e-6)
            same = isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype
            if not same or not torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-6):
                return False
    return True
