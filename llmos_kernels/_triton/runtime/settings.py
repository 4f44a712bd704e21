"""Tuned launch settings, which ``python -m llmos_kernels tune`` writes to ``tuned/*.json``.

Settings are looked up by the GPU's name, else by its architecture, then by the nearest shape in log
space. A shape whose sizes differ by a factor of 4 or more does not count. If there are no settings,
or tuning found the launcher's own rule to be as fast, the launcher's rule decides.
"""

import contextlib
import functools
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from llmos_kernels._core.tuned import folders

FORMAT = 1
_ROWS = ("ROWS", "num_warps")
_TILE = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
_GEMM = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
#: For each kind of launch that is tuned, the names of its settings and the number of sizes in its
#: shape.
KINDS: dict[str, tuple[tuple[str, ...], int]] = {
    **dict.fromkeys(("layer_norm", "layer_norm backward", "int8_norm", "embedding"), (_ROWS, 1)),
    **{
        f"attention {name}{load}": (_TILE, 1)
        for name in ("forward", "dquery", "dkey")
        for load in ("", " masked", " dropout")
    },
    **{f"attention {name}": (_TILE, 1) for name in ("decode", "dmask", "weights")},
    **{f"linear{name}": (("persistent", *_GEMM), 3) for name in ("", " dinput", " dweight")},
    "int8": (_GEMM, 3),
    "int8 outliers": (_GEMM, 3),
}
#: The name and architecture of the GPU whose settings apply to tensors on the CPU, while kernels
#: are compiled ahead of time; None otherwise.
planned: tuple[str | None, str] | None = None
_overridden: dict[str, dict | None] = {}


def _check(kind: str, entry: dict) -> None:
    """Raise ValueError if a launcher could not use ``entry``."""
    names, sizes = KINDS[kind]
    shape, chosen = entry["shape"], entry["settings"]
    if len(shape) != sizes or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"{kind}: shape {shape}")
    if not isinstance(getattr(torch, entry["dtype"], None), torch.dtype):
        raise ValueError(f"{kind}: dtype {entry['dtype']}")
    if chosen is None:
        return
    if {*chosen} != {*names} or not all(type(v) is int for v in chosen.values()):
        raise ValueError(f"{kind}: settings {chosen}")
    for name, value in chosen.items():
        smallest, largest = {"persistent": (0, 1), "num_stages": (1, 8), "num_warps": (1, 32)}.get(
            name, (16 if name.startswith("BLOCK") else 1, 1024)
        )
        is_valid = name in ("persistent", "num_stages") or value & (value - 1) == 0
        if not smallest <= value <= largest or not is_valid:
            raise ValueError(f"{kind}: {name} {value}")


def read(path: Path) -> dict:
    """Return the table in ``path``; raise ValueError with the file and what is wrong with it."""
    try:
        table = json.loads(path.read_text())
        if table["format"] != FORMAT:
            raise ValueError(f"has format {table['format']}, expected {FORMAT}")
        for kind, entries in table["settings"].items():
            for entry in entries:
                _check(kind, entry)
        if not isinstance(table["gpu"], str) or not isinstance(table["arch"], str):
            raise ValueError("gpu and arch must be strings")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from e
    return table


@functools.cache
def tables() -> list[dict]:
    """Return all tables, the user's first; warn of each file that cannot be read."""
    readable = []
    for path in (p for folder in folders() for p in sorted(folder.glob("*.json"))):
        try:
            readable.append(read(path))
        except ValueError as e:
            warnings.warn(f"{e}; its launch settings are not used", RuntimeWarning, stacklevel=2)
    return readable


def _entries(name: str | None, arch: str, kind: str, dtype: str) -> list[dict]:
    """Return the entries of the first table for the GPU, by its name or else its architecture."""
    for key, value in (("gpu", name), ("arch", arch)):
        for table in tables():
            found = [e for e in table["settings"].get(kind, ()) if e["dtype"] == dtype]
            if table[key] == value and found:
                return found
    return []


@functools.cache
def _gpu(device: torch.device) -> tuple[str, str]:
    """Return the name and the architecture of a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"


def distance(a: tuple, b: tuple) -> float:
    """Return the squared log2 distance of two shapes; inf if a size differs by 4 times or more."""
    differences = [abs(math.log2(m / n)) for m, n in zip(a, b, strict=True)]
    return math.inf if max(differences) >= 2 else sum(d * d for d in differences)


@functools.lru_cache(maxsize=4096)
def _nearest(name: str | None, arch: str, kind: str, dtype: str, shape: tuple) -> dict | None:
    """Return the settings of the nearest shape; None without one, or if the rule was as fast."""
    entries = _entries(name, arch, kind, dtype)
    if kind.startswith("attention"):  # Tiles that fit one head dim may not fit another.
        entries = [e for e in entries if tuple(e["shape"]) == shape]
    best = min(entries, key=lambda e: distance(e["shape"], shape), default=None)
    return best["settings"] if best and distance(best["shape"], shape) < math.inf else None


def settings(kind: str, like: torch.Tensor, shape: tuple[int, ...]) -> dict | None:
    """Return the tuned settings for a launch of ``kind``, or None if the launcher's rule decides.

    ``like`` gives the device and the dtype of the launch.
    """
    if kind in _overridden:
        return _overridden[kind]
    if not tables() or min(shape) < 1:
        return None
    gpu = _gpu(like.device) if like.is_cuda else planned
    if gpu is None:
        return None
    return _nearest(*gpu, kind, str(like.dtype).removeprefix("torch."), shape)


@contextlib.contextmanager
def override(kind: str, chosen: dict | None) -> Iterator[None]:
    """Launch ``kind`` with the settings ``chosen`` inside the context; None stands for the rule."""
    _overridden[kind] = chosen
    try:
        yield
    finally:
        del _overridden[kind]
