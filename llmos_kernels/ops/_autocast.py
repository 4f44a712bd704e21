"""What autocast does to the arguments of functions that torch runs in its lower precision."""

import torch
from torch import Tensor


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast runs such a function of ``input`` in; None where it is off."""
    device = input.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast(*tensors: Tensor | None) -> tuple:
    """The arguments, the first of them a tensor, in that dtype; bool and float64 stay."""
    dtype = autocast_dtype(tensors[0])  # type: ignore[arg-type]
    if dtype is None:
        return tensors
    keep = (torch.bool, torch.float64)
    return tuple(t if t is None or t.dtype in keep else t.to(dtype) for t in tensors)
