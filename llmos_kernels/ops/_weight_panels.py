"""Copies of weights in panels, in the order in which the C++ GEMM reads them.

A GEMM packs its right operand in panels, for each task anew. A weight that does not change can be
packed once. The copy is as large as the weight, or on CPUs without instructions for its 16-bit
dtype twice as large.
"""

from collections.abc import Container, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmos_kernels._core.registry import define

__all__: list[str] = []


def _fake(weight: Tensor) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty(size, dtype=torch.uint8)


linear_panels = define(
    "linear_panels(Tensor weight) -> Tensor",
    reference=lambda weight: weight.new_empty(0, dtype=torch.uint8),
    fake=_fake,
)


class _Copy(NamedTuple):
    """A copy of a weight, and the weight as it was then.

    ``weight`` shares the memory, which therefore no other tensor can get meanwhile, and the version
    counter.
    """

    weight: Tensor
    version: int
    panels: Tensor


class WeightPanels:
    """The copies of some weights, each remade once its weight was written or replaced.

    Writes in place, ``load_state_dict`` and most optimizers change a weight's version, the
    assignment of another parameter or of ``.data`` its memory. A write such as
    ``weight.data.add_(1)``, or one by NumPy, changes neither and is not seen.

    Example:
        >>> layer = torch.nn.Linear(64, 128)
        >>> panels = WeightPanels()
        >>> panels.of([layer.weight])[0].dtype
        torch.uint8
    """

    def __init__(self) -> None:
        self._copies: list[_Copy | None] = []

    def of(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the copies of ``weights``, which are the same weights at each call.

        Args:
            weights: [out, in] each, float32, bfloat16 or float16 on a CPU.

        Returns:
            For each weight its panels, bytes.
        """
        if len(self._copies) != len(weights):
            self._copies = [None] * len(weights)
        return [self._of(i, weight) for i, weight in enumerate(weights)]

    def drop(self, addresses: Container[int]) -> None:
        """Drop the copies of weights whose memory begins at one of ``addresses``."""
        kept = (
            c if c is None or c.weight.data_ptr() not in addresses else None for c in self._copies
        )
        self._copies = [*kept]

    def _of(self, i: int, weight: Tensor) -> Tensor:
        copy = self._copies[i]
        if copy is None or not _is_as_then(weight, copy):
            copy = _Copy(weight.detach(), weight._version, linear_panels(weight.detach()))
            self._copies[i] = copy
        return copy.panels


def _is_as_then(weight: Tensor, copy: _Copy) -> bool:
    then = copy.weight
    return (
        weight._version == copy.version
        and weight.data_ptr() == then.data_ptr()
        and weight.dtype is then.dtype
        and weight.shape == then.shape
        and weight.stride() == then.stride()
    )
