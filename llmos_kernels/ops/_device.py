"""An op that says which build of the CUDA extension a GPU runs."""

import torch
from torch import Tensor

from llmos_kernels._core.registry import define

__all__: list[str] = []


def _reference(like: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=like.device)


#: Returns [1], int32, on the device of ``like``: the compute capability of the build, 90 for sm_90,
#: or 0 where the CUDA extension has no build for the device.
built_for = define("built_for(Tensor like) -> Tensor", reference=_reference, fake=_reference)
