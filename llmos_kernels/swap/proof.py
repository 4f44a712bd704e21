"""Proof that a swapped module computes what the original does, and how long each takes.

Both run as replicas: parameters are copies, hooks are left out, random state is put back. The
model itself is not touched.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.residual import residual_parts
from llmos_kernels.testing import error_over_budget, interleaved, make_gradients

_ROWS = 16


def replica(
    module: nn.Module, cls: type | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy of ``module`` without its hooks, as ``cls`` and in ``dtype`` where they are given."""
    new: Any = cls or type(module)

    def copy(t):
        if t is None:
            return None
        data = t.detach().to(dtype if dtype and t.is_floating_point() else t.dtype, copy=True)
        return nn.Parameter(data, t.is_floating_point()) if isinstance(t, nn.Parameter) else data

    clone = new.__new__(new)
    clone.__dict__.update(module.__dict__)
    for name in module.__dict__:
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            clone.__dict__[name] = OrderedDict()
    clone._parameters = {k: copy(p) for k, p in module._parameters.items()}
    clone._buffers = {k: copy(b) for k, b in module._buffers.items()}
    clone._modules = {
        k: m if m is None else replica(m, None, dtype) for k, m in module._modules.items()
    }
    if isinstance(clone, nn.Dropout):
        clone.p = 0.0  # Another generator draws other masks; the op's own tests compare those.
    return clone


def example_inputs(module: nn.Module) -> tuple[Tensor, ...]:
    """Random inputs for a module of ``rules``; raises ValueError where their shape is unknown."""
    parameter = next(module.parameters(), torch.empty(0))
    options: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return (torch.randn(_ROWS, *module.normalized_shape, **options),)
    parts = residual_parts(module)
    if parts is None:
        raise ValueError(f"the inputs of {type(module).__name__} are unknown: pass inputs=")
    dense, _, norm = parts
    if not isinstance(getattr(dense, "in_features", None), int):
        raise ValueError(f"the input width of {type(dense).__name__} is unknown: pass inputs=")
    shapes = [(dense.in_features,), norm.normalized_shape]
    return tuple(torch.randn(_ROWS, *shape, **options) for shape in shapes)


def largest_error(module: nn.Module, cls: type, inputs: tuple[Tensor, ...]) -> float:
    """The largest error over its budget of outputs and gradients, in eval and in train mode."""
    worst = 0.0
    for training in (False, True):
        exact = _outputs_and_gradients(
            replica(module, dtype=torch.float64), inputs, training, torch.float64
        )
        eager = _outputs_and_gradients(replica(module), inputs, training)
        actual = _outputs_and_gradients(replica(module, cls), inputs, training)
        if not len(actual) == len(eager) == len(exact):
            return float("inf")
        ratios = map(error_over_budget, actual, exact, eager)
        worst = max(worst, *ratios)
    return worst


def _outputs_and_gradients(module, inputs, training, dtype=None) -> list[Tensor]:
    module.train(training)
    with torch.enable_grad():
        leaves = [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in inputs]
        y = module(*leaves)
        wanted = [*leaves, *module.parameters()]
        gradients = torch.autograd.grad(y, wanted, make_gradients([y])[0], allow_unused=True)
    return [y.detach(), *(g for g in gradients if g is not None)]


def speedup(module: nn.Module, cls: type, inputs: tuple[Tensor, ...]) -> float:
    """The original's time over the swapped one's, in eval mode, medians of interleaved runs."""
    old, new = replica(module).eval(), replica(module, cls).eval()
    with torch.inference_mode():
        before, after = interleaved(
            [lambda: old(*inputs), lambda: new(*inputs)], rounds=9, seconds=5e-4
        )
    return before / after


def captured_inputs(model: nn.Module, modules: list[nn.Module], call: Callable) -> dict:
    """The tensors that each of ``modules`` is called with first while ``call()`` runs ``model``."""
    found: dict[nn.Module, tuple[Tensor, ...]] = {}

    def remember(module, args, kwargs):
        values = inspect.signature(module.forward).bind(*args, **kwargs).arguments.values()
        if module not in found and all(isinstance(v, Tensor) for v in values):
            found[module] = tuple(v.detach().clone() for v in values)

    modes = {m: m.training for m in model.modules()}
    handles = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in modules]
    try:
        for module in modes:  # Not eval(), which a model may have given other effects.
            module.training = False
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found
