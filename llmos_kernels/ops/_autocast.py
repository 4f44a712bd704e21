"""Autocast for ops that torch would run in autocast's lower precision."""

from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast on the device of ``input``, or None where autocast is off."""
    device = input.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the arguments, the first a tensor, in autocast's dtype; bool and float64 stay."""
    dtype = autocast_dtype(tensors[0])  # type: ignore[arg-type]
    if dtype is None:
        return tensors
    unchanged = (torch.bool, torch.float64)
    return tuple(t if t is None or t.dtype in unchanged else t.to(dtype) for t in tensors)
