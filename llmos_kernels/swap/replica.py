"""Copies of modules to run instead of them."""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from llmos_kernels.nn.int8 import Int8Linear


def replica(
    module: nn.Module,
    cls: type | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    made: dict[nn.Module, nn.Module] | None = None,
    classes: dict[nn.Module, type] | None = None,
    dropout: bool = False,
) -> nn.Module:
    """A copy of ``module`` without its hooks, as ``cls``, in ``dtype`` and on ``device`` where they
    are given. ``classes``: what modules in it are to be instead; ``made``: copies of modules that may
    come again in it. Without ``dropout`` nothing in it drops."""
    made = {} if made is None else made
    if module in made:
        return made[module]
    new: Any = cls or (classes or {}).get(module, type(module))

    def copy(t):
        if t is None:
            return None
        wanted = dtype if dtype and t.is_floating_point() else t.dtype
        data = t.detach().to(device or t.device, wanted, copy=True)
        return nn.Parameter(data, t.is_floating_point()) if isinstance(t, nn.Parameter) else data

    clone = made[module] = new.__new__(new)
    clone.__dict__.update(module.__dict__)
    for name in module.__dict__:
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            clone.__dict__[name] = OrderedDict()
    clone._parameters = {k: copy(p) for k, p in module._parameters.items()}
    clone._buffers = {k: copy(b) for k, b in module._buffers.items()}
    clone._modules = {
        k: m if m is None else replica(m, None, dtype, device, made, classes, dropout)
        for k, m in module._modules.items()
    }
    if isinstance(clone, Int8Linear):  # Its scales are float32 in every dtype.
        scale: Any = module.weight_scale
        clone._buffers["weight_scale"] = scale.to(device or scale.device, copy=True)
        clone.__dict__["_vnni_source"] = None
    # Another generator draws other masks; the op's own tests compare those.
    if isinstance(clone, nn.Dropout) and not dropout:
        clone.p = 0.0
    if isinstance(clone, nn.MultiheadAttention) and not dropout:
        clone.dropout = 0.0
    return clone
