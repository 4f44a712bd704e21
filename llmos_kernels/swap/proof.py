"""Proof that a swapped module computes what the original does, and how long each takes.

Both run as replicas: parameters are copies, hooks are left out, random state is put back. The
model itself is not touched.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.linear import is_conv1d
from llmos_kernels.nn.residual import residual_parts
from llmos_kernels.swap.chains import find_steps, input_width
from llmos_kernels.swap.norms import rms_norm_eps
from llmos_kernels.swap.replica import replica
from llmos_kernels.testing import error_over_budget, interleaved, make_gradients

LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_ROWS = 16
_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> list:
        return [*self.args, *self.kwargs.values()]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Call":
        """The call with ``fn`` of each tensor; a tensor given twice stays one tensor."""
        tensors = {id(v): v for v in self.values if isinstance(v, Tensor)}
        new = {i: fn(t) for i, t in tensors.items()}
        args = tuple(new.get(id(v), v) for v in self.args)
        return Call(args, {k: new.get(id(v), v) for k, v in self.kwargs.items()})

    def on(self, module: nn.Module) -> Any:
        """What ``module`` returns."""
        return module(*self.args, **self.kwargs)


def example_calls(module: nn.Module, batch: int = 4, length: int = 2 * _ROWS + 1) -> list[Call]:
    """Random calls of a module of ``rules``; raises ValueError where their shape is unknown.

    Layers and feed-forward blocks get ``batch`` sequences of ``length``.
    """
    parameter = next(module.parameters(), torch.empty(0))
    options: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return [Call((torch.randn(_ROWS, *module.normalized_shape, **options),))]
    if isinstance(module, nn.MultiheadAttention):
        return _attention_calls(module, options)
    if isinstance(module, LAYERS):
        return _layer_calls(module, options, batch, length)
    if isinstance(module, nn.Linear):
        return [Call((torch.randn(_ROWS, module.in_features, **options),))]
    if is_conv1d(module):
        return [Call((torch.randn(2, _ROWS, len(parameter), **options),))]
    if rms_norm_eps(module):
        return [Call((torch.randn(_ROWS, len(parameter), **options),))]
    if find_steps(module):
        return [Call((torch.randn(batch, length, input_width(module), **options),))]
    parts = residual_parts(module)
    if parts is None:
        raise ValueError(f"the inputs of {type(module).__name__} are unknown: pass inputs=")
    dense, _, norm = parts
    if not isinstance(getattr(dense, "in_features", None), int):
        raise ValueError(f"the input width of {type(dense).__name__} is unknown: pass inputs=")
    shapes = [(dense.in_features,), norm.normalized_shape]
    return [Call(tuple(torch.randn(_ROWS, *shape, **options) for shape in shapes))]


def _attention_calls(module: nn.MultiheadAttention, options: dict[str, Any]) -> list[Call]:
    """Causal self-attention where the widths allow it, and cross-attention with padding."""
    batch, q_len, k_len = 4, 2 * _ROWS + 1, 3 * _ROWS - 1

    def make(length, dim):
        shape = (batch, length) if module.batch_first else (length, batch)
        return torch.randn(*shape, dim, **options)

    query, device = make(q_len, module.embed_dim), options["device"]
    causal = torch.ones(q_len, q_len, dtype=torch.bool, device=device).triu(1)
    ends = torch.randint(1, k_len + 1, (batch, 1), device=device)
    padding = torch.arange(k_len, device=device) >= ends
    cross = (query, make(k_len, module.kdim), make(k_len, module.vdim))
    calls = [Call(cross, {"key_padding_mask": padding})]
    if module.kdim == module.vdim == module.embed_dim:
        calls.insert(0, Call((query,) * 3, {"attn_mask": causal, "need_weights": False}))
    return calls


def _layer_calls(module: nn.Module, options: dict[str, Any], batch: int, length: int) -> list[Call]:
    """Causal with padding, and without masks; a decoder layer also gets a memory with padding."""
    attention: Any = module.self_attn

    def make(length):
        shape = (batch, length) if attention.batch_first else (length, batch)
        return torch.randn(*shape, attention.embed_dim, **options)

    def padding(length):
        ends = torch.randint(1, length + 1, (batch, 1), device=options["device"])
        return torch.arange(length, device=options["device"]) >= ends

    causal = torch.ones(length, length, dtype=torch.bool, device=options["device"]).triu(1)
    if isinstance(module, nn.TransformerEncoderLayer):
        masks = {"src_mask": causal, "src_key_padding_mask": padding(length)}
        return [Call((make(length),), masks), Call((make(length),))]
    args, masks = (make(length), make(length + 5)), {"tgt_mask": causal}
    masks |= {"memory_key_padding_mask": padding(length + 5)}
    return [Call(args, masks), Call(args)]


def largest_error(module: nn.Module, cls: type, call: Call) -> float:
    """The largest error over its budget of outputs and gradients, in eval and in train mode.

    Where every key of a query is masked, an attention of torch and all its gradients may be NaN,
    ours are not: outputs are then compared elsewhere, and gradients on calls of our own.

    A hidden value of a layer or a feed-forward block that is next to 0 may round to either side of
    it, where the derivative of relu jumps, for torch as for us. So their gradients are compared in
    float32, on few rows, and in the median of three draws.
    """
    if not (isinstance(module, LAYERS) or find_steps(module)):
        return _largest_error(module, cls, call)
    parameter = next(module.parameters())
    wide = module
    if parameter.dtype not in (torch.float32, torch.float64):
        wide = replica(module, dtype=torch.float32)
    draws = (
        max(_largest_error(wide, cls, c) for c in example_calls(wide, batch=2, length=4))
        for _ in range(3)
    )
    return max(_largest_error(module, cls, call, gradients=False), statistics.median(draws))


def _largest_error(module: nn.Module, cls: type, call: Call, gradients: bool = True) -> float:
    worst = 0.0
    # A model's own RMS norm casts to float32. ``rms_norm_eps`` has seen that ours computes the same.
    wide_cls = cls if rms_norm_eps(module) else None
    for training in (False, True):
        exact, exact_gradients = _outputs_and_gradients(
            replica(module, wide_cls, dtype=torch.float64), call, training, torch.float64
        )
        eager, eager_gradients = _outputs_and_gradients(replica(module), call, training)
        actual, actual_gradients = _outputs_and_gradients(replica(module, cls), call, training)
        if isinstance(module, nn.MultiheadAttention) and any(o.isnan().any() for o in exact):
            actual = [
                a.where(a.isnan() | ~e.isnan(), e) for a, e in zip(actual, eager, strict=True)
            ]
            errors = [largest_error(module, cls, c) for c in example_calls(module)]
            worst = max(worst, *errors)
        elif gradients:
            exact, eager = exact + exact_gradients, eager + eager_gradients
            actual = actual + actual_gradients
        if not len(actual) == len(eager) == len(exact):
            return float("inf")
        worst = max(worst, *map(error_over_budget, actual, exact, eager))
    return worst


def _outputs_and_gradients(
    module, call: Call, training, dtype=None
) -> tuple[list[Tensor], list[Tensor]]:
    """All outputs, and the gradients of the first one."""

    def leaf(t):
        if not t.is_floating_point():
            return t
        return t.detach().to(dtype or t.dtype, copy=True).requires_grad_()

    module.train(training)
    with torch.enable_grad():
        leaves = call.map(leaf)
        y = leaves.on(module)
        outputs = [o for o in (y if isinstance(y, tuple) else (y,)) if isinstance(o, Tensor)]
        wanted = [v for v in leaves.values if isinstance(v, Tensor) and v.requires_grad]
        gradients = torch.autograd.grad(
            outputs[0],
            [*wanted, *module.parameters()],
            make_gradients(outputs[:1]),
            allow_unused=True,
        )
    return [o.detach() for o in outputs], [g for g in gradients if g is not None]


def speedup(module: nn.Module, cls: type, call: Call) -> float:
    """The original's time over the swapped one's, in eval mode, medians of interleaved runs."""
    old, new = replica(module).eval(), replica(module, cls).eval()
    with torch.inference_mode():
        before, after = interleaved(
            [lambda: call.on(old), lambda: call.on(new)], rounds=9, seconds=5e-4
        )
    return before / after


def captured_calls(
    model: nn.Module, modules: list[nn.Module], call: Callable
) -> dict[nn.Module, Call]:
    """How each of ``modules`` is called first while ``call()`` runs ``model``.

    A call with other arguments than tensors, None, numbers and strings is not kept.
    """
    found: dict[nn.Module, Call] = {}

    def remember(module, args, kwargs):
        given = Call(args, kwargs)
        if module not in found and all(isinstance(v, (Tensor, *_PLAIN)) for v in given.values):
            found[module] = given.map(lambda t: t.detach().clone())

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
