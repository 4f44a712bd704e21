"""How modules are called: by the model they are in, or with random numbers of the right shapes."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.linear import is_conv1d
from llmos_kernels.nn.residual import residual_parts
from llmos_kernels.swap.chains import find_steps, input_width
from llmos_kernels.swap.norms import rms_norm_eps

LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
#: What a captured call may have for arguments besides tensors.
PLAIN = (type(None), bool, int, float, str)
_ROWS = 16


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: tuple | dict) -> "Call":
        """The call that ``inputs``, a tuple or a dict by name, stand for."""
        return cls(kwargs=inputs) if isinstance(inputs, dict) else cls(inputs)

    @property
    def values(self) -> list:
        return [*self.args, *self.kwargs.values()]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Call":
        """The call with ``fn`` of each tensor; a tensor given twice stays one tensor."""
        tensors = {id(v): v for v in self.values if isinstance(v, Tensor)}
        new = {i: fn(t) for i, t in tensors.items()}
        args = tuple(new.get(id(v), v) for v in self.args)
        return Call(args, {k: new.get(id(v), v) for k, v in self.kwargs.items()})

    def copied(self) -> "Call":
        """A copy of it and of all that it holds; what is given twice stays one."""
        memo: dict[int, Any] = {}

        def copied(v: Any) -> Any:
            if isinstance(v, PLAIN):
                return v
            if id(v) not in memo:
                memo[id(v)] = _copy(v)
            return memo[id(v)]

        return Call(tuple(map(copied, self.args)), {k: copied(v) for k, v in self.kwargs.items()})

    @property
    def rows(self) -> int:
        """How many rows of features its first tensor has."""
        first = next((v for v in self.values if isinstance(v, Tensor)), None)
        if first is None or not first.is_floating_point():  # Tokens.
            return 1 if first is None else first.numel()
        return first.shape[:-1].numel()

    def on(self, module: nn.Module) -> Any:
        """What ``module`` returns."""
        return module(*self.args, **self.kwargs)


def example_calls(module: nn.Module, size: tuple[int, int] | None = None) -> list[Call]:
    """Random calls of a module of ``rules``; raises ValueError where their shape is unknown.

    ``size``: how many sequences of which length, or for what knows only rows as many of them.
    """
    rows = _ROWS if size is None else math.prod(size)
    batch, length = size or (4, 2 * _ROWS + 1)
    parameter = next(module.parameters(), torch.empty(0))
    options: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return [Call((torch.randn(rows, *module.normalized_shape, **options),))]
    if isinstance(module, nn.MultiheadAttention):
        return _attention_calls(module, options, batch, length)
    if isinstance(module, LAYERS):
        return _layer_calls(module, options, batch, length)
    if isinstance(module, nn.Linear):
        return [Call((torch.randn(rows, module.in_features, **options),))]
    if is_conv1d(module):
        return [Call((torch.randn(1, rows, len(parameter), **options),))]
    if rms_norm_eps(module):
        return [Call((torch.randn(rows, len(parameter), **options),))]
    if find_steps(module):
        return [Call((torch.randn(batch, length, input_width(module), **options),))]
    parts = residual_parts(module)
    if parts is None:
        raise ValueError(f"the inputs of {type(module).__name__} are unknown: pass inputs=")
    dense, _, norm = parts
    if not isinstance(getattr(dense, "in_features", None), int):
        raise ValueError(f"the input width of {type(dense).__name__} is unknown: pass inputs=")
    shapes = [(dense.in_features,), norm.normalized_shape]
    return [Call(tuple(torch.randn(rows, *shape, **options) for shape in shapes))]


def _attention_calls(
    module: nn.MultiheadAttention, options: dict[str, Any], batch: int, q_len: int
) -> list[Call]:
    """Causal self-attention where the widths allow it, and cross-attention with padding."""
    k_len = q_len + _ROWS - 2

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


def permuted(call: Call) -> Call:
    """Return a call like ``call``: the features of every finite floating point tensor in another order."""

    def shuffled(t: Tensor) -> Tensor:
        if t.ndim == 0 or not t.is_floating_point() or not t.isfinite().all():
            return t
        return t[..., torch.randperm(t.shape[-1], device=t.device)]

    return call.map(shuffled)


def captured_calls(
    model: nn.Module, modules: list[nn.Module], call: Callable
) -> dict[nn.Module, list[Call]]:
    """How each of ``modules`` is called while ``call()`` runs ``model``: first, and where others differ in
    their number of rows, with the fewest and with the most.

    A call with other arguments than tensors, None, numbers and strings is not kept, nor one of nested
    tensors, which autograd takes in few places.
    """
    found: dict[nn.Module, list[Call]] = {}

    def remember(module, args, kwargs):
        given = Call(args, kwargs)
        plain = all(isinstance(v, (Tensor, *PLAIN)) for v in given.values)
        if not plain or any(isinstance(v, Tensor) and v.is_nested for v in given.values):
            return
        calls = found.setdefault(module, [])
        rows = [c.rows for c in calls]
        if not calls or given.rows < min(rows) or given.rows > max(rows):
            calls.append(given.map(lambda t: t.detach().clone()))
            others = sorted(calls[1:], key=lambda c: c.rows)
            calls[1:] = others[:1] + others[1:][-1:]

    handles = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in modules]
    try:
        with evaluating(model), torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return found


class ModelRun:
    """A call of ``model``, as often as it is wanted: its arguments are copies, and what the model
    writes to its buffers and to numbers and strings that it holds is put back.
    """

    def __init__(self, model: nn.Module, call: Call):
        self.model, self.call = model, call
        modules = list(model.modules())
        self._buffers = [
            (m._buffers, name, b, b.detach().clone())
            for m in modules
            for name, b in m._buffers.items()
            if b is not None and not b.is_inference()
        ]
        self._versions = [b._version for _, _, b, _ in self._buffers]
        self._plain = [
            (vars(m), name, value)
            for m in modules
            for name, value in vars(m).items()
            if isinstance(value, PLAIN) and name != "training"
        ]
        self._seen = False

    def __call__(self, backward: bool = False) -> bool:
        """Run it, with the gradients of its parameters if ``backward``; whether there were any."""
        given = self.call.copied()
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        found: tuple = ()
        try:
            with torch.set_grad_enabled(backward):
                outputs = list(tensors_in(given.on(self.model)))
                outputs = [t.sum() for t in outputs if t.requires_grad]
                if backward and outputs and wanted:
                    total = torch.stack(outputs).sum()
                    found = torch.autograd.grad(total, wanted, allow_unused=True)
        finally:
            self._put_back()
        return any(g is not None for g in found)

    def _put_back(self) -> None:
        with torch.no_grad():
            for i, (buffers, name, buffer, before) in enumerate(self._buffers):
                buffers[name] = buffer
                if buffer._version != self._versions[i]:
                    buffer.copy_(before)
                    self._versions[i] = buffer._version
        changed = [p for p in self._plain if p[0].get(p[1]) is not p[2]]
        for values, name, value in changed:
            values[name] = value
        if not self._seen:  # What one call leaves as it is, others do, too.
            self._plain, self._seen = changed, True


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, torch.Generator):
        return value.clone_state()
    try:
        return copy.deepcopy(value)
    except Exception:  # What cannot be copied has to do.
        return value


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode, without a call of its ``eval``, which may have been given other effects."""
    modes = {m: m.training for m in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating point tensors of what a model returns."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(v)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(vars(value))
