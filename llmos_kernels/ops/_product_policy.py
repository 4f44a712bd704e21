"""The product policy: it says which library computes a matrix product, this one or torch's.

A product of [rows, depth] by [depth, width] takes rows * depth * width multiply-accumulates (MACs).
The answers are data: ``tuned/cpu/products.json`` and ``tuned/gpu/products.json`` hold entries for a
direction and a dtype, with the machines and sizes that they are for, the library that computes
these, and where it was measured to be the fastest. Where that is null the entry is a conservative
rule without a measurement: torch's own library. A field that is null matches every machine, or
every size. ``rows``, ``macs``, ``depth`` and ``width`` are ranges ``[from, below]``; the upper end
may be null. The first entry that matches answers.

The directions are the forward product, the gradients of its input (``dinput``; with the derivative
of an activation fused, ``dinput_activation``) and of its weight. An entry for ``layer`` is a range
of sizes of a whole ``nn.Linear``: outside of all of them torch computes the layer and its
gradients; inside, the other directions decide, and the entry's provider is null.
"""

import functools
import itertools
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

__all__: list[str] = []

FORWARD, DINPUT, DINPUT_ACTIVATION = "forward", "dinput", "dinput_activation"
DWEIGHT, LAYER = "dweight", "layer"
DIRECTIONS = (FORWARD, DINPUT, DINPUT_ACTIVATION, DWEIGHT, LAYER)

OURS, CUBLAS, ONEDNN, MKL, ATEN = "ours", "cublas", "onednn", "mkl", "aten"
#: torch's own linear layer and its gradients, whichever library these call.
TORCH = "torch"
#: The providers that a table may name, as they are written for people.
PROVIDERS = {OURS: "llmos_kernels", CUBLAS: "cuBLAS", ONEDNN: "oneDNN", MKL: "MKL"}

FOLDER = Path(__file__).parent.parent / "tuned"
FORMAT = 1
#: The upper end of a range that has none.
NO_LIMIT = sys.maxsize
_SIZES = ("rows", "macs", "depth", "width")
_COMMON = {"direction", "dtype", "provider", "measured", *_SIZES}
_FIELDS = {
    "cpu": {*_COMMON, "vendor", "family", "isa", "amx", "threads", "torch_library"},
    "gpu": {*_COMMON, "gpu", "arch"},
}


class Cpu(NamedTuple):
    """The properties of a CPU and of its torch that the entries for CPUs are matched with."""

    vendor: str | None  # As CPUID spells it: GenuineIntel, AuthenticAMD.
    family: int | None
    isa: str  # The instruction set that our kernels use; "none" without the extension.
    amx: bool  # Whether the CPU has AMX, which oneDNN uses whatever our kernels do.
    onednn: frozenset[torch.dtype]  # The dtypes whose products torch gives to oneDNN.
    mkl: bool


class ProductRule(NamedTuple):
    """The provider of products whose sizes lie in these ranges, the upper ends excluded.

    ``threads`` are the numbers of threads for which the rule holds, or None for all: a caller can
    change torch's at any time, so it is compared when a product asks.
    """

    provider: str
    threads: tuple[int, ...] | None
    rows_from: int
    rows_below: int
    macs_from: int
    macs_below: int
    depth_from: int
    depth_below: int
    width_from: int
    width_below: int


@functools.cache
def cpu() -> Cpu:
    """Return what this CPU and this torch are, as seen when the first product asks."""
    extension = sys.modules.get("llmos_kernels._C")
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    vendor = re.search(r"^vendor_id\s*: (\S+)", text, re.MULTILINE)
    family = re.search(r"^cpu family\s*: (\d+)", text, re.MULTILINE)
    onednn = []
    mkldnn = torch.ops.mkldnn
    usable = torch.backends.mkldnn.is_available() and hasattr(mkldnn, "_linear_pointwise")
    if usable and mkldnn._is_mkldnn_bf16_supported():
        onednn.append(torch.bfloat16)
        if mkldnn._is_mkldnn_fp16_supported():
            onednn.append(torch.float16)
    return Cpu(
        "GenuineIntel" if extension and extension.is_intel() else vendor and vendor[1],
        int(family[1]) if family else None,
        extension.cpu_level() if extension else "none",
        torch.cpu._is_amx_tile_supported(),
        frozenset(onednn),
        torch.backends.mkl.is_available(),
    )


def torch_library(dtype: torch.dtype, onednn_enabled: bool = True) -> str:
    """Return which library computes torch's CPU products of ``dtype``; ATEN is a plain loop."""
    if dtype in cpu().onednn:
        # torch.backends.mkldnn.enabled governs bfloat16 alone; float16 stays with oneDNN.
        return ONEDNN if onednn_enabled or dtype == torch.float16 else ATEN
    return MKL if cpu().mkl and dtype in (torch.float32, torch.float64) else ATEN


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
    except (ValueError, KeyError, TypeError) as e:
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
    paths = sorted((FOLDER / kind).glob("products*.json"))
    return [entry for path in paths for entry in read(path, kind)]


def _facts(device: torch.device, dtype: torch.dtype, onednn_enabled: bool) -> dict:
    """Return the fields of an entry that a device and dtype fix."""
    if device.type == "cpu":
        facts = cpu()._asdict()
        library = torch_library(dtype, onednn_enabled)
        return {k: facts[k] for k in Cpu._fields[:4]} | {"torch_library": library}
    major, minor = torch.cuda.get_device_capability(device)
    return {"gpu": torch.cuda.get_device_name(device), "arch": f"sm_{major}{minor}"}


def _matches(entry: dict, facts: dict) -> bool:
    for name, fact in facts.items():
        wanted = entry[name]
        if wanted is not None and fact not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def _rule(entry: dict) -> ProductRule:
    ranges = ((entry[name] or [0, None]) for name in _SIZES)
    limits = [(low, NO_LIMIT if high is None else high) for low, high in ranges]
    threads = entry.get("threads")
    if threads is not None:
        threads = tuple(threads) if isinstance(threads, list) else (threads,)
    provider = entry["provider"] or OURS  # A layer inside of the range is ours.
    return ProductRule(provider, threads, *itertools.chain.from_iterable(limits))


def _holds_now(threads: tuple[int, ...] | None) -> bool:
    """Return True if a rule for these numbers of threads, None for all, holds at this moment."""
    return threads is None or torch.get_num_threads() in threads


def _first(
    rules: tuple[ProductRule, ...], rows: int, macs: int, depth: int, width: int
) -> str | None:
    """Return the provider of the first rule for these sizes and torch's threads, or None."""
    for provider, threads, r, r_end, m, m_end, d, d_end, w, w_end in rules:
        fits = r <= rows < r_end and m <= macs < m_end and d <= depth < d_end and w <= width < w_end
        if fits and _holds_now(threads):
            return provider
    return None


#: The results of ``_table``. The key is (dtype, device); for CPU dtypes that torch can give to
#: oneDNN it is (dtype, device, whether oneDNN is enabled).
_tables: dict[tuple, dict[str, tuple[ProductRule, ...]]] = {}


def _table(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[ProductRule, ...]]:
    """Return the rules of each direction for products of ``dtype`` on ``device``."""
    enabled = torch._C._get_mkldnn_enabled()
    if known := _tables.get((dtype, device, enabled)):
        return known
    depends = device.type == "cpu" and dtype in cpu().onednn
    key = (dtype, device, enabled) if depends else (dtype, device)
    found: dict[str, list[ProductRule]] = {direction: [] for direction in DIRECTIONS}
    kind = {"cpu": "cpu", "cuda": "gpu"}.get(device.type)
    if kind:
        facts = _facts(device, dtype, enabled)
        for entry in _entries(kind):
            if entry["dtype"] == str(dtype).removeprefix("torch.") and _matches(entry, facts):
                found[entry["direction"]].append(_rule(entry))
    return _tables.setdefault(key, {d: tuple(of_direction) for d, of_direction in found.items()})


def rules(direction: str, dtype: torch.dtype, device: torch.device) -> tuple[ProductRule, ...]:
    """Return the rules that ``choose`` tries in order, for the number of threads of this moment."""
    table = _tables.get((dtype, device)) or _table(dtype, device)
    return tuple(r for r in table[direction] if _holds_now(r.threads))


def choose(
    direction: str,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    depth: int,
    width: int,
    layer: bool = False,
) -> str:
    """Return who computes a product: OURS, CUBLAS, ONEDNN, MKL or, for a ``layer`` alone, TORCH.

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
    """
    table = _tables.get((dtype, device)) or _table(dtype, device)
    macs = rows * depth * width
    if layer and _first(table[LAYER], rows, macs, depth, width) is None:
        return TORCH
    return _first(table[direction], rows, macs, depth, width) or OURS
