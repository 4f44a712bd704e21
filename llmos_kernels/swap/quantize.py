"""``quantize``: int8 weights for the linear layers of a model, where that is faster."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmos_kernels._core.registry import KERNEL_DTYPES
from llmos_kernels._core.timing import interleaved
from llmos_kernels.nn.attention import MultiheadAttention
from llmos_kernels.nn.int8 import (
    Int8Linear,
    attention_becomes_int8,
    become_int8,
    quantized_rows,
)
from llmos_kernels.nn.linear import Linear
from llmos_kernels.nn.transformer import TransformerEncoderLayer
from llmos_kernels.ops.int8_linear import MODES, check_threshold, int8_linear
from llmos_kernels.ops.int8_vnni_weight import int8_vnni_weight
from llmos_kernels.ops.linear import project
from llmos_kernels.swap.calls import ModelRun, ModuleCall
from llmos_kernels.swap.int8_summary import Int8Entry, Int8Report
from llmos_kernels.swap.optimize import MARK, capture, check_model
from llmos_kernels.swap.rules.linear import FusedConv1D, is_conv1d
from llmos_kernels.swap.rules.rule import ancestors, why_untouchable

#: The number of rows on which an error is measured, in float64.
_MAX_ERROR_ROWS = 1024
#: Numbers of rows at which a layer must be faster, by mode, if the user gives none.
ROWS = {"dynamic": (1, 128), "weight_only": (1,)}


def quantize(
    model: nn.Module,
    mode: str = "dynamic",
    outlier_threshold: float = 6.0,
    skip: Sequence[str] = ("lm_head",),
    always: bool = False,
    *,
    rows: Sequence[int] | None = None,
    inputs: tuple | Mapping | None = None,
) -> Int8Report:
    """Give the linear layers of ``model`` int8 weights, in place; the float weights are gone then.

    ``nn.Linear``, the ``Conv1D`` of transformers and the projections of ``nn.MultiheadAttention``
    become ``nn.Int8Linear``; names, biases and hooks stay. Each is timed against the original,
    equal layers once. Optimize first and quantize then: a quantized layer is not swapped again.

    Args:
        model: any ``torch.nn.Module``.
        mode: "dynamic" or "weight_only", see ``int8_linear``.
        outlier_threshold: for "dynamic", the magnitude from which a column of the input stays
            float; 0 turns this off.
        skip: names, or last parts of names, of modules to leave out with everything in them.
        always: quantize a layer also where int8 is slower.
        rows: the numbers of rows of input at which a layer must be faster. Default: 1 and 128; with
            "weight_only" 1.
        inputs: a tuple of arguments of ``model``, or a dict of keyword arguments. The model runs
            them once, in eval mode, and errors are measured on what each layer gets. Default:
            random numbers.

    Returns:
        An ``Int8Report``. ``print(report)`` shows each layer with its error, speedups and size.

    Raises:
        TypeError: ``model`` is no module, or ``inputs`` neither a tuple nor a dict.
        ValueError: another argument has a value that is not allowed; or a weight is not finite, or
            has more than 131,071 columns.

        The model is unchanged after any of them.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU())
        >>> report = quantize(model, inputs=(torch.randn(8, 512),), always=True)
        >>> type(model[0]).__name__
        'Int8Linear'

    Source: LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, for the outlier columns.
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
    options = _Options(mode, threshold, rows, always)
    before = _size(model)
    plan = [(name, m, _why_not(model, name, m, skip)) for name, m in _candidates(model)]
    with torch.inference_mode(False), torch.no_grad():
        weights = {m: _quantized(name, m) for name, m, why in plan if not why}
        run = None if inputs is None else ModelRun(model, ModuleCall.of(inputs))
        seen = capture(model, [m for _, m, why in plan if not why], run)
        timed: dict[tuple[Any, ...], dict[int, float]] = {}
        entries = []
        for name, module, why in plan:
            entry = Int8Entry(name, type(module).__name__, False, why)
            if not why:
                calls = seen.get(module, [])
                entry = _judged(name, module, weights[module], options, calls, timed)
            entries.append(entry)
        for entry, (_, module, _) in zip(entries, plan, strict=True):
            if entry.quantized:
                replace(module, weights[module], mode, threshold)
    leave_fast_path(model)
    return Int8Report(entries, before, _size(model))


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each attention module, and each linear layer that is not part of one, once."""
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
    """Return whether ``skip`` names a module, or a module that contains it.

    Args:
        name: the name of the module in its model.
        skip: full names, or last parts of names.
    """
    parts = name.split(".")
    outer = {".".join(parts[: i + 1]) for i in range(len(parts))}
    return any(s in outer or s in parts for s in skip)


def _why_not(model: nn.Module, name: str, module: Any, skip: Sequence[str]) -> str:
    if is_skipped(name, skip):
        return "skip names it"
    whys = [why_untouchable(module, ancestors(model, name))]
    if isinstance(module, nn.MultiheadAttention):
        whys += _why_no_attention(model, name, module, skip)
    elif "weight" not in module._parameters:
        whys.append("its weight is no parameter of its own (a parametrization, or pruning)")
    elif isinstance(module, nn.Linear) and type(module) not in (nn.Linear, Linear):
        name = type(module).__name__
        whys.append(f"{name} is a subclass of Linear and may compute something else")
    if "forward" in module.__dict__:
        whys.append("its forward has been replaced on the instance")
    why = next(filter(None, whys), "")
    if why:
        return why
    parameters = {id(p) for p in module.parameters()}
    inside = set(module.modules())
    for other_name, other in model.named_modules():
        if other not in inside and parameters & {id(p) for p in other._parameters.values()}:
            return f"its weight is that of {other_name or 'the model'} too"
    for p in module.parameters():
        if p.dtype not in KERNEL_DTYPES:
            return f"no kernel for {p.dtype}"
    return ""


def _why_no_attention(
    model: nn.Module, name: str, module: Any, skip: Sequence[str]
) -> Iterator[str]:
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
    """Return weight [out, in] and bias of a linear layer, or of the two in an attention."""
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


@dataclass(frozen=True)
class _Options:
    """Arguments of ``quantize`` that are the same for every layer."""

    mode: str
    threshold: float
    rows: tuple[int, ...]
    always: bool


def _judged(
    name: str,
    module: nn.Module,
    weights: list[tuple[Tensor, Tensor]],
    options: _Options,
    calls: list[ModuleCall],
    timed: dict[tuple[Any, ...], dict[int, float]],
) -> Int8Entry:
    """Return what becomes of one module, by its speed, with its error.

    Args:
        name: its name.
        module: a linear layer or an attention.
        weights: int8 rows and scales of each of its ``layers``.
        options: how it becomes int8.
        calls: how it was called; empty where that is unknown.
        timed: speedups of layers that were timed before, to which those of this one are added.
    """
    # The input of an attention is that of its first layer.
    given = calls[0].args[0] if calls and calls[0].args else None
    error, before, after = 0.0, 0, 0
    rows, mode, threshold = options.rows, options.mode, options.threshold
    speedups = dict.fromkeys(rows, math.inf)
    for (weight, bias), (q, scale) in zip(layers(module), weights, strict=True):
        x = given
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1] == q.shape[1]):
            x = torch.randn(max(rows), q.shape[1], dtype=weight.dtype, device=weight.device)
        given = None
        x = x.reshape(math.prod(x.shape[:-1]), q.shape[1])[:_MAX_ERROR_ROWS].to(weight.dtype)
        exact = nn.functional.linear(x.double(), weight.double())
        made = int8_linear(x, q, scale, None, None, threshold, mode=mode).double()
        norm = exact.norm().item()
        error = max(error, (made - exact).norm().item() / norm if norm else 0.0)
        ours = isinstance(module, (Linear, MultiheadAttention, FusedConv1D))
        original: Callable[..., Tensor] = project if ours else nn.functional.linear
        key = (original, *weight.shape, weight.stride(), weight.dtype, weight.device, bias is None)
        if key not in timed:
            timed[key] = {
                n: _speedup(original, weight, bias, (q, scale), options, _with_rows(x, n))
                for n in rows
            }
        speedups = {n: min(s, timed[key][n]) for n, s in speedups.items()}
        before += weight.nbytes
        after += q.nbytes + scale.nbytes
    slow = [f"{s:.2f}x at {n} row{'s' * (n > 1)}" for n, s in speedups.items() if s <= 1]
    reason = "" if not slow or options.always else f"int8 is not faster: {', '.join(slow)}"
    cls = type(module).__name__
    return Int8Entry(name, cls, not reason, reason, error, speedups, before, after)


def _with_rows(x: Tensor, rows: int) -> Tensor:
    """Return ``rows`` rows of ``x`` [n, width], repeated as needed; zeros if n is 0."""
    if not len(x):
        return x.new_zeros(rows, x.shape[1])
    return x[torch.arange(rows, device=x.device) % len(x)]


def _speedup(
    original: Callable[..., Tensor],
    weight: Tensor,
    bias: Tensor | None,
    int8_weight: tuple[Tensor, Tensor],
    options: _Options,
    x: Tensor,
) -> float:
    """Return the time of ``original`` over that of int8, on the input ``x`` [rows, in].

    ``int8_weight`` holds the int8 rows [out, in] of ``weight``, and their scales.
    """
    q, scale = int8_weight
    mode, threshold = options.mode, options.threshold
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


def replace(module: Any, weights: list[tuple[Tensor, Tensor]], mode: str, threshold: float) -> None:
    """Make ``module`` int8, in place.

    Args:
        module: a linear layer or an attention.
        weights: int8 rows [out, in] and scales [out] of each of its ``layers``.
        mode: as for ``quantize``.
        threshold: the outlier threshold.
    """
    module.__dict__.pop(MARK, None)
    if isinstance(module, nn.MultiheadAttention):
        attention_becomes_int8(module, weights, mode, threshold)
    else:
        become_int8(module, weights[0], mode, threshold)


def leave_fast_path(model: nn.Module) -> None:
    """Turn off torch's fused Transformer layer, and nested tensors, where layers in it are int8.

    torch's fused layer would read the float weights past the int8 layers. Nested tensors are taken
    nowhere else by torch's own encoder layer.
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
