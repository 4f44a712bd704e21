"""The product policy: it says which library computes a matrix product, this one or torch's.

A product of [rows, depth] by [depth, width] takes rows * depth * width multiply-accumulates (MACs).
The directions are the forward product, the gradients of its input (``dinput``; with the derivative
of an activation fused, ``dinput_activation``) and of its weight, and the whole ``nn.Linear``
(``layer``). The answers are data. On a CPU that was measured with this number of threads, the
nearest measured size answers (``ops/_product_measurements.py``); where the times do not differ, the
answer is ours. A whole ``nn.Linear`` is torch's unless ours was faster: its forward, or where
gradients are recorded its forward and backward together.

Elsewhere rules answer: ``tuned/cpu/products.json`` and ``tuned/gpu/products.json`` hold entries for
a direction and a dtype, with the machines and sizes that they are for, the library that computes
these, and where it was measured to be the fastest. Where that is null the entry is a conservative
rule without a measurement: torch's own library. A field that is null matches every machine, or
every size. ``rows``, ``macs``, ``depth`` and ``width`` are ranges ``[from, below]``; the upper end
may be null. The first entry that matches answers.

A rule for ``layer`` is a range of sizes: outside of all of them torch computes the layer and its
gradients; inside, the other directions decide, and the entry's provider is null.
"""

import contextlib
import functools
import itertools
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from llmos_kernels._core.tuned import RULES, folders
from llmos_kernels.ops._cpu_facts import ATEN, MKL, ONEDNN, cpu, torch_library
from llmos_kernels.ops._product_measurements import (
    DIRECTIONS,
    FORWARD,
    LAYER,
    Grid,
    grids,
)

__all__: list[str] = []

OURS, CUBLAS = "ours", "cublas"
#: torch's own linear layer and its gradients, whichever library these call.
TORCH = "torch"
#: The providers, as they are written for people.
PROVIDERS = {
    OURS: "llmos_kernels",
    CUBLAS: "cuBLAS",
    ONEDNN: "oneDNN",
    MKL: "MKL",
    ATEN: "own loops",
}

FORMAT = 1
#: The upper end of a range that has none.
NO_LIMIT = sys.maxsize
_SIZES = ("rows", "macs", "depth", "width")
_COMMON = {"direction", "dtype", "provider", "measured", *_SIZES}
_FIELDS = {
    "cpu": {*_COMMON, "vendor", "family", "isa", "amx", "threads", "torch_library"},
    "gpu": {*_COMMON, "gpu", "arch"},
}


class ProductRule(NamedTuple):
    """The provider of products whose sizes lie in these ranges, the upper ends excluded."""

    provider: str
    rows_from: int
    rows_below: int
    macs_from: int
    macs_below: int
    depth_from: int
    depth_below: int
    width_from: int
    width_below: int


def read(path: Path, kind: str) -> list[dict]:
    """Return the entries of a table for ``kind``, "cpu" or "gpu".

    Raises:
        ValueError: The file is malformed; the message names it, and what is wrong.
    """
    try:
        table = json.loads(path.read_text())
        if table["format"] != FORMAT:
            raise ValueError(f"format {table['format']}, expected {FORMAT}")
        for entry in table["products"]:
            _check(entry, kind)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from e
    return table["products"]


def _check(entry: dict, kind: str) -> None:
    """Raise ValueError for an entry that ``choose`` could not use."""
    if {*entry} != _FIELDS[kind]:
        raise ValueError(f"fields {sorted(entry)}, expected {sorted(_FIELDS[kind])}")
    providers = (None,) if entry["direction"] == LAYER else PROVIDERS
    if entry["direction"] not in DIRECTIONS or entry["provider"] not in providers:
        raise ValueError(f"{entry['direction']} by {entry['provider']}")
    if not isinstance(getattr(torch, str(entry["dtype"]), None), torch.dtype):
        raise ValueError(f"dtype {entry['dtype']}")
    for name in _SIZES:
        if entry[name] is None:
            continue
        low, high = entry[name]
        if (
            type(low) is not int
            or low < 0
            or not (high is None or (type(high) is int and high > low))
        ):
            raise ValueError(f"{name} {entry[name]}, expected [from, below]")


@functools.cache
def _entries(kind: str) -> list[dict]:
    """Return the rules of every readable file, the user's first; warn of each that is not."""
    found: list[dict] = []
    for path in (p for f in folders() for p in sorted((f / kind).glob(f"{RULES}*.json"))):
        try:
            found += read(path, kind)
        except ValueError as e:
            warnings.warn(f"{e}; its rules are not used", RuntimeWarning, stacklevel=2)
    return found


def _facts(device: torch.device, library: str, threads: int) -> dict:
    """Return what a device fixes: the facts that files of measured times and rules may name."""
    if device.type == "cpu":
        return cpu()._asdict() | {"torch_library": library, "threads": threads}
    major, minor = torch.cuda.get_device_capability(device)
    return {"gpu": torch.cuda.get_device_name(device), "arch": f"sm_{major}{minor}"}


def _matches(entry: dict, facts: dict) -> bool:
    for name in entry.keys() & facts.keys():
        wanted, fact = entry[name], facts[name]
        if wanted is not None and fact not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def _rule(entry: dict) -> ProductRule:
    ranges = ((entry[name] or [0, None]) for name in _SIZES)
    limits = [(low, NO_LIMIT if high is None else high) for low, high in ranges]
    provider = entry["provider"] or OURS  # A layer inside of the range is ours.
    return ProductRule(provider, *itertools.chain.from_iterable(limits))


def _first(rules: tuple[ProductRule, ...], rows: int, depth: int, width: int) -> str | None:
    """Return the provider of the first rule for these sizes, or None."""
    macs = rows * depth * width
    for provider, r, r_end, m, m_end, d, d_end, w, w_end in rules:
        if r <= rows < r_end and m <= macs < m_end and d <= depth < d_end and w <= width < w_end:
            return provider
    return None


class Table(NamedTuple):
    """What is known of the products of one dtype on one device, by direction.

    The rules count for directions that were not measured.
    """

    measured: dict[str, Grid]
    rules: dict[str, tuple[ProductRule, ...]]

    @property
    def may_own_layers(self) -> bool:
        """True if our kernels compute whole ``nn.Linear`` layers of some size."""
        measured = [self.measured[d] for d in (FORWARD, LAYER) if d in self.measured]
        if measured:
            return any(point.faster == OURS for grid in measured for point in grid.points)
        return bool(self.rules[LAYER])


@functools.lru_cache(maxsize=256)
def _table(dtype: torch.dtype, device: torch.device, threads: int, onednn_enabled: bool) -> Table:
    found: dict[str, list[ProductRule]] = {direction: [] for direction in DIRECTIONS}
    measured: dict[str, Grid] = {}
    kind = {"cpu": "cpu", "cuda": "gpu"}.get(device.type)
    if kind:
        library = torch_library(dtype, onednn_enabled) if kind == "cpu" else CUBLAS
        facts = _facts(device, library, threads)
        if kind == "cpu":
            measured = grids(dtype, library, facts)
        for entry in _entries(kind):
            if entry["dtype"] == str(dtype).removeprefix("torch.") and _matches(entry, facts):
                found[entry["direction"]].append(_rule(entry))
    return Table(measured, {d: tuple(of_direction) for d, of_direction in found.items()})


def table(dtype: torch.dtype, device: torch.device) -> Table:
    """Return what ``choose`` looks at, for torch's settings of this moment."""
    return _table(dtype, device, torch.get_num_threads(), torch._C._get_mkldnn_enabled())


@functools.lru_cache(maxsize=4096)
def _answer(
    direction: str,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    depth: int,
    width: int,
    layer: bool,
    has_gradients: bool,
    threads: int,
    onednn_enabled: bool,
) -> str:
    """Return what ``choose`` returns, for these settings of torch."""
    measured, rules = _table(dtype, device, threads, onednn_enabled)
    sizes = rows, depth, width
    if layer:
        whole = LAYER if has_gradients and direction == FORWARD else direction
        if whole not in measured:
            if _first(rules[LAYER], *sizes) is None:
                return TORCH
        elif direction == FORWARD and measured[whole].faster(*sizes) != OURS:
            return TORCH
    if direction in measured:
        grid = measured[direction]
        return grid.torch_library if grid.faster(*sizes) == TORCH else OURS
    return _first(rules[direction], *sizes) or OURS


#: The answers of the moment for some directions, whatever was measured.
_overridden: dict[str, str] = {}


@contextlib.contextmanager
def override(answers: dict[str, str]) -> Iterator[None]:
    """Let ``choose`` return ``answers`` for these directions inside the context."""
    _overridden.update(answers)
    try:
        yield
    finally:
        _overridden.clear()


def choose(
    direction: str,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    depth: int,
    width: int,
    layer: bool = False,
    has_gradients: bool = False,
) -> str:
    """Return who computes a product: OURS, CUBLAS, ONEDNN, MKL, ATEN or, for a ``layer``, TORCH.

    Args:
        direction: FORWARD, DINPUT, DINPUT_ACTIVATION or DWEIGHT.
        dtype: The dtype of both factors.
        device: Where they are. On devices without a table the answer is OURS, for a ``layer``
            TORCH.
        rows: Rows of the layer's input, an int. Traced code does not call this: it records an op
            that calls it at run time.
        depth: The layer's in_features.
        width: Its out_features.
        layer: Whether the product belongs to an ``nn.Linear`` without an activation. Only then can
            the answer be TORCH: torch's own layer and its gradients.
        has_gradients: Whether the gradients of the layer are recorded.
    """
    if direction in _overridden:
        return _overridden[direction]
    # A caller can change both settings at any time.
    settings = torch.get_num_threads(), torch._C._get_mkldnn_enabled()
    return _answer(direction, dtype, device, rows, depth, width, layer, has_gradients, *settings)


def are_ours(
    dtype: torch.dtype, device: torch.device, rows: int, shapes: tuple[tuple[int, ...], ...]
) -> bool:
    """Return True if ours is the choice for the forward products with some weights, in one op.

    That is where ours takes no longer for all of them together, by what was measured, than torch's
    products and their calls from Python, which the op saves. Elsewhere, where ``choose`` answers
    OURS for each, or the product takes no longer than its call.

    Args:
        dtype: The dtype of both factors.
        device: Where they are.
        rows: Rows of the input.
        shapes: [out, in] of each weight.
    """
    if FORWARD in _overridden:
        return _overridden[FORWARD] == OURS
    enabled = torch._C._get_mkldnn_enabled()
    return _are_ours(dtype, device, rows, shapes, torch.get_num_threads(), enabled)


#: A product of so many MACs takes about 10 us on one core, as two calls from Python do.
_SMALL_MACS, _CALL_US = 1 << 19, 5.0


@functools.lru_cache(4096)
def _are_ours(
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    shapes: tuple[tuple[int, ...], ...],
    threads: int,
    onednn_enabled: bool,
) -> bool:
    """Return ``are_ours`` for what ``choose`` looks up by itself: threads, and oneDNN's switch."""
    grid = _table(dtype, device, threads, onednn_enabled).measured.get(FORWARD)
    if grid is not None:
        times = [grid.times(rows, depth, width) for width, depth in shapes]
        return sum(ours - (theirs + _CALL_US) for ours, theirs in times) <= 0
    return all(
        rows * width * depth <= _SMALL_MACS
        or choose(FORWARD, dtype, device, rows, depth, width) == OURS
        for width, depth in shapes
    )
