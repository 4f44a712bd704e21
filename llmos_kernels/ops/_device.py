"""Which build of the CUDA part answers on a GPU: its compute capability, 90 for sm_90."""

import torch
from torch import Tensor

from llmos_kernels._registry import define


def _reference(like: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=like.device)


#: ``built_for(like)`` [1] int32: 0 where no CUDA part answers on the device of ``like``.
built_for = define("built_for(Tensor like) -> Tensor", reference=_reference, fake=_reference)
