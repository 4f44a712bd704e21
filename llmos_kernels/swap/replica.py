"""Copies of modules that run in their place, in proofs and in timings."""

from collections import OrderedDict, deque
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.int8 import Int8Linear


def _copied(value: Any) -> Any:
    """Return a copy of plain data, so that a copied forward changes nothing of the original's."""
    if type(value) is Tensor:
        return value.detach().clone()
    if type(value) in (list, set, deque):
        return type(value)(map(_copied, value))
    return {k: _copied(v) for k, v in value.items()} if type(value) is dict else value


def replica(
    module: nn.Module,
    cls: type | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    made: dict[nn.Module, nn.Module] | None = None,
    classes: dict[nn.Module, type] | None = None,
    dropout: bool = False,
) -> nn.Module:
    """Return a copy of ``module`` without its hooks; parameters, buffers and plain data are copies.

    Args:
        module: what is copied; its own methods are not called.
        cls: the class of the copy. Default: that of ``module``.
        dtype: the dtype of floating point parameters and buffers. Default: their own.
        device: the device of the copy. Default: that of each tensor. A tensor on the meta device,
            which has no data, becomes an uninitialised one.
        made: copies that exist already, by their original. A module that occurs twice is copied
            once.
        classes: the classes of copies of modules inside, by their original.
        dropout: whether dropout stays on.
    """
    made = {} if made is None else made
    if module in made:
        return made[module]
    new_class: Any = cls or (classes or {}).get(module, type(module))

    def copy(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        new_dtype = dtype if dtype and t.is_floating_point() else t.dtype
        if t.is_meta and device is not None:
            data = torch.empty_like(t, device=device, dtype=new_dtype)
        else:
            data = t.detach().to(device or t.device, new_dtype, copy=True)
        return nn.Parameter(data, t.is_floating_point()) if isinstance(t, nn.Parameter) else data

    clone = made[module] = object.__new__(new_class)
    contents = ("_parameters", "_buffers", "_modules")
    attributes = {k: v for k, v in module.__dict__.items() if k not in contents}
    clone.__dict__.update({k: _copied(v) for k, v in attributes.items()})
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
    # Each implementation draws other dropout masks. The tests of the ops compare those.
    if isinstance(clone, nn.Dropout) and not dropout:
        clone.p = 0.0
    if isinstance(clone, nn.MultiheadAttention) and not dropout:
        clone.dropout = 0.0
    return clone
