"""``quantize``: the linear layers of a model with int8 weights, where that is faster."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmos_kernels._registry import KERNEL_DTYPES
from llmos_kernels.nn.attention import MultiheadAttention
from llmos_kernels.nn.int8 import (
    Int8Linear,
    attention_becomes_int8,
    become_int8,
    quantized_rows,
)
from llmos_kernels.nn.linear import FusedConv1D, Linear, is_conv1d
from llmos_kernels.nn.transformer import TransformerEncoderLayer
from llmos_kernels.ops.int8_linear import MODES, check_threshold, int8_linear, int8_vnni_weight
from llmos_kernels.ops.linear import project
from llmos_kernels.swap.calls import Call, ModelRun
from llmos_kernels.swap.optimize import MARK, around, capture, check_model
from llmos_kernels.swap.report import table
from llmos_kernels.swap.rules import why_untouchable
from llmos_kernels.testing import interleaved

_MOST_ROWS = 1024  # On which an error is measured, in float64.
#: Rows of input at which a layer must be faster, if its user gives none.
ROWS = {"dynamic": (1, 128), "weight_only": (1,)}


@dataclass(frozen=True)
class Int8Entry:
    """One layer. ``error`` is the norm of its results' error over the norm of the results,
    ``speedups`` the original's time over that of int8 for each number of rows; sizes in bytes.
    """

    module: str
    cls: str
    quantized: bool
    reason: str = ""
    error: float | None = None
    speedups: dict[int, float] = field(default_factory=dict)
    before: int = 0
    after: int = 0


@dataclass
class Int8Report:
    """Every linear layer that ``quantize`` looked at. ``print(report)`` shows it as a table."""

    entries: list[Int8Entry]
    before: int  # Bytes of all parameters and buffers of the model.
    after: int

    @property
    def quantized(self) -> list[Int8Entry]:
        """The layers that are int8 now."""
        return [e for e in self.entries if e.quantized]

    @property
    def kept(self) -> list[Int8Entry]:
        """The layers that stayed as they were; ``reason`` says why."""
        return [e for e in self.entries if not e.quantized]

    def to_dict(self) -> dict:
        """The same as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("module", "class", "result", "error", "speedup by rows", "size")]
        rows += [
            (
                e.module or "(the model)",
                e.cls,
                "int8" if e.quantized else f"kept: {e.reason}",
                "" if e.error is None else f"{e.error:.2%}",
                ", ".join(f"{rows}: {s:.2f}x" for rows, s in e.speedups.items()),
                f"{_mib(e.before)} -> {_mib(e.after)}" if e.quantized else "",
            )
            for e in self.entries
        ]
        size = f"{_mib(self.before)} -> {_mib(self.after)}"
        return f"{table(rows)}\n{len(self.quantized)} int8, {len(self.kept)} kept, {size}"


def quantize(
    model: nn.Module,
    mode: str = "dynamic",
    outlier_threshold: float = 6.0,
    skip: Sequence[str] = ("lm_head",),
    always: bool = False,
    *,
    rows: Sequence[int] | None = None,
    inputs: tuple | dict | None = None,
) -> Int8Report:
    """Give the linear layers of ``model`` int8 weights, in place; the float weights are gone then.

    ``nn.Linear``, the ``Conv1D`` of transformers and the projections of ``nn.MultiheadAttention``
    become ``Int8Linear`` of ``mode`` and ``outlier_threshold`` (of "dynamic" alone); names, biases and
    hooks stay. Each is timed against the original at each number of ``rows`` of input (1 and 128; with
    "weight_only" 1), equal layers once, and kept where it is slower at any, unless ``always``.
    ``skip``: names, or last parts of names, of layers to leave out, with all in them. ``inputs`` (a tuple
    of arguments, or a dict of keyword arguments) are run through the model once, in eval mode, so that
    errors are measured on what each layer really gets; random numbers are used otherwise.

    Optimize first and quantize then: a quantized layer is not swapped again. Raises TypeError for a
    ``model`` that is no module, ValueError for other arguments and for a weight that is not finite or has
    more than 131,071 columns, the model unchanged.
    """
    check_model(model, inputs)
    threshold = check_threshold(outlier_threshold)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    rows = ROWS[mode] if rows is None else tuple(rows)
    skip = (skip,) if isinstance(skip, str) else tuple(skip or ())
    if not rows or any(type(n) is not int or n < 1 for n in rows):
        raise ValueError(f"rows must be whole numbers of 1 or more, got {rows!r}")
    threshold = threshold if mode == "dynamic" else 0.0
    before = _size(model)
    plan = [(name, m, _why_not(model, name, m, skip)) for name, m in _candidates(model)]
    with torch.inference_mode(False), torch.no_grad():
        weights = {m: _quantized(name, m) for name, m, why in plan if not why}
        run = None if inputs is None else ModelRun(model, Call.of(inputs))
        seen = capture(model, [m for _, m, why in plan if not why], run)
        timed: dict[tuple, dict[int, float]] = {}
        entries = []
        for name, module, why in plan:
            entry = Int8Entry(name, type(module).__name__, False, why)
            if not why:
                entry = _judged(name, module, weights[module], mode, threshold, always, rows,
                                seen.get(module, []), timed)  # fmt: skip
            entries.append(entry)
        for entry, (_, module, _) in zip(entries, plan, strict=True):
            if entry.quantized:
                replace(module, weights[module], mode, threshold)
    leave_fast_path(model)
    return Int8Report(entries, before, _size(model))


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, and attention modules with what is in them, once each."""
    inside: set[nn.Module] = set()
    kinds = nn.Linear, FusedConv1D
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside.update(module.modules())
        elif module in inside or not (isinstance(module, kinds) or is_conv1d(module)):
            continue
        if type(module) is not Int8Linear and "in_proj" not in module._modules:
            yield name, module


def is_skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether ``name`` or a module it lies in is named in ``skip``, in full or by its last part."""
    parts = name.split(".")
    outer = {".".join(parts[: i + 1]) for i in range(len(parts))}
    return any(s in outer or s in parts for s in skip)


def _why_not(model: nn.Module, name: str, module: Any, skip: Sequence[str]) -> str:
    if is_skipped(name, skip):
        return "skip names it"
    whys = [why_untouchable(module, around(model, name))]
    if isinstance(module, nn.MultiheadAttention):
        whys += _why_no_attention(model, name, module, skip)
    elif "weight" not in module._parameters:
        whys.append("its weight is no parameter of its own (a parametrization, or pruning)")
    elif isinstance(module, nn.Linear) and type(module) not in (nn.Linear, Linear):
        whys.append(f"{type(module).__name__} is a subclass of Linear with a forward of its own")
    if "forward" in module.__dict__:
        whys.append("its forward has been replaced on the instance")
    why = next(filter(None, whys), "")
    if why:
        return why
    mine = {id(p) for p in module.parameters()}
    own = set(module.modules())
    for other_name, other in model.named_modules():
        if other not in own and mine & {id(p) for p in other._parameters.values()}:
            return f"its weight is that of {other_name or 'the model'} too"
    for p in module.parameters():
        if p.dtype not in KERNEL_DTYPES:
            return f"no kernel for {p.dtype}"
    return ""


def _why_no_attention(model: nn.Module, name: str, module: Any, skip) -> Iterator[str]:
    out = module.out_proj
    if type(module) not in (nn.MultiheadAttention, MultiheadAttention):
        yield f"{type(module).__name__} is a subclass of MultiheadAttention"
    if not module._qkv_same_embed_dim:
        yield "its query, key and value have different widths"
    elif "in_proj_weight" not in module._parameters or "weight" not in out._parameters:
        yield "its weights are no parameters of its own (a parametrization, or pruning)"
    if type(out) not in (NonDynamicallyQuantizableLinear, nn.Linear, Linear):
        yield f"its out_proj is a {type(out).__name__}"
    if is_skipped(f"{name}.out_proj" if name else "out_proj", skip):
        yield "skip names its out_proj"
    if sum(out in m._modules.values() for m in model.modules()) > 1:
        yield "its out_proj is another module's too"


def layers(module: Any) -> list[tuple[Tensor, Tensor | None]]:
    """weight [out, in] and bias of each linear layer that ``module`` stands for."""
    if isinstance(module, nn.MultiheadAttention):
        out = module.out_proj
        return [(module.in_proj_weight, module.in_proj_bias), (out.weight, out.bias)]
    if isinstance(module, nn.Linear):
        return [(module.weight, module.bias)]
    return [(module.weight.mT, module.bias)]


def _quantized(name: str, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    try:
        return [quantized_rows(weight) for weight, _ in layers(module)]
    except ValueError as e:
        raise ValueError(f"{name or 'the model'} has {e}: name it in skip to keep it") from None


def _judged(name, module, weights, mode, threshold, always, rows, calls, timed) -> Int8Entry:
    """What to do with one module, by its speed and its error."""
    # The input of an attention is that of its first layer.
    given = calls[0].args[0] if calls and calls[0].args else None
    error, before, after = 0.0, 0, 0
    speedups = dict.fromkeys(rows, math.inf)
    for (weight, bias), (q, scale) in zip(layers(module), weights, strict=True):
        x = given
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1] == q.shape[1]):
            x = torch.randn(max(rows), q.shape[1], dtype=weight.dtype, device=weight.device)
        given = None
        x = x.reshape(math.prod(x.shape[:-1]), q.shape[1])[:_MOST_ROWS].to(weight.dtype)
        exact = nn.functional.linear(x.double(), weight.double())
        made = int8_linear(x, q, scale, None, None, threshold, mode=mode).double()
        norm = exact.norm().item()
        error = max(error, (made - exact).norm().item() / norm if norm else 0.0)
        ours = isinstance(module, (Linear, MultiheadAttention, FusedConv1D))
        original = project if ours else nn.functional.linear
        key = (original, *weight.shape, weight.stride(), weight.dtype, weight.device, bias is None)
        if key not in timed:
            timed[key] = {
                n: _speedup(original, weight, bias, q, scale, mode, threshold, n, x) for n in rows
            }
        speedups = {n: min(s, timed[key][n]) for n, s in speedups.items()}
        before += weight.nbytes
        after += q.nbytes + scale.nbytes
    slow = [f"{s:.2f}x at {n} row{'s' * (n > 1)}" for n, s in speedups.items() if s <= 1]
    reason = f"int8 is not faster: {', '.join(slow)}" if slow and not always else ""
    cls = type(module).__name__
    return Int8Entry(name, cls, not reason, reason, error, speedups, before, after)


def _speedup(original, weight, bias, q, scale, mode, threshold, rows: int, x: Tensor) -> float:
    """The original's time over that of int8, for rows like those of ``x``."""
    x = x[torch.arange(rows, device=x.device) % max(len(x), 1)] if len(x) else x.new_zeros(
        rows, x.shape[1]
    )  # fmt: skip
    vnni_weight = int8_vnni_weight(q) if mode == "dynamic" else None
    old, new = interleaved(
        [
            lambda: original(x, weight, bias),
            lambda: int8_linear(
                x, q, scale, bias, None, threshold, mode=mode, vnni_weight=vnni_weight
            ),
        ],
        rounds=9,
        seconds=5e-4,
    )
    return old / new


def replace(module: Any, weights: list, mode: str, threshold: float) -> None:
    """Make ``module`` int8, with rows and scales for each of its ``layers``."""
    module.__dict__.pop(MARK, None)
    if isinstance(module, nn.MultiheadAttention):
        attention_becomes_int8(module, weights, mode, threshold)
    else:
        become_int8(module, weights[0], mode, threshold)


def leave_fast_path(model: nn.Module) -> None:
    """Turn torch's own fused layer off where it would read float weights past the int8 layers, and the
    nested tensors that torch's layer takes there alone.
    """
    int8 = {
        m
        for m in model.modules()
        if isinstance(m, nn.TransformerEncoderLayer)
        and any(type(part) is Int8Linear for part in m.modules())
    }
    for layer in int8:
        layer.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            stock = [m for m in encoder.layers if not isinstance(m, TransformerEncoderLayer)]
            encoder.use_nested_tensor &= int8.isdisjoint(stock)


def _size(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({id(t): t.nbytes for t in tensors}.values())


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
