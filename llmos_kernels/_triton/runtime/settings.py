"""Launch settings that were measured on GPUs: ``tuned/*.json``, as ``python -m llmos_kernels tune`` writes them.

Looked up by the GPU's name, else its architecture; then by the nearest shape, in log space, that is
less than a factor of 4 away in every size. Where there is none, or the rule of the launcher was found to
be as fast, the rule decides.
"""

import contextlib
import functools
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

FORMAT = 1
#: Where settings come with the package; LLMOS_TUNED names a folder that is looked at before.
FOLDER = Path(__file__).parents[2] / "tuned"
_ROWS = ("ROWS", "num_warps")
_TILE = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
_PRODUCT = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
#: What is tuned: what its settings are, and how many sizes its shape has.
KINDS: dict[str, tuple[tuple[str, ...], int]] = {
    **dict.fromkeys(("layer_norm", "layer_norm backward", "int8_norm", "embedding"), (_ROWS, 1)),
    **{
        f"attention {name}{load}": (_TILE, 1)
        for name in ("forward", "dquery", "dkey")
        for load in ("", " masked", " dropout")
    },
    **{f"attention {name}": (_TILE, 1) for name in ("decode", "dmask", "weights")},
    **{f"linear{name}": (("persistent", *_PRODUCT), 3) for name in ("", " dinput", " dweight")},
    "int8": (_PRODUCT, 3),
    "int8 outliers": (_PRODUCT, 3),
}
#: The name and the architecture of the GPU whose settings hold for tensors on the CPU, when kernels are
#: compiled ahead of time.
planned: tuple[str | None, str] | None = None
_overridden: dict[str, dict | None] = {}


def folders() -> list[Path]:
    own = os.environ.get("LLMOS_TUNED")
    return [*([Path(own)] if own else []), FOLDER]


def _check(kind: str, entry: dict) -> None:
    """Raises ValueError for an entry that a launcher could not take."""
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
        least, most = {"persistent": (0, 1), "num_stages": (1, 8), "num_warps": (1, 32)}.get(
            name, (16 if name.startswith("BLOCK") else 1, 1024)
        )
        power = name in ("persistent", "num_stages") or value & (value - 1) == 0
        if not least <= value <= most or not power:
            raise ValueError(f"{kind}: {name} {value}")


def read(path: Path) -> dict:
    """The settings in ``path``. Raises ValueError naming the file, and what is wrong with it."""
    try:
        table = json.loads(path.read_text())
        if table["format"] != FORMAT:
            raise ValueError(f"of format {table['format']}, expected {FORMAT}")
        for kind, entries in table["settings"].items():
            for entry in entries:
                _check(kind, entry)
        if not isinstance(table["gpu"], str) or not isinstance(table["arch"], str):
            raise ValueError("gpu and arch must be names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from e
    return table


@functools.cache
def tables() -> list[dict]:
    """All that can be read, the user's own first; of a file that cannot be a warning."""
    found = []
    for path in (p for folder in folders() for p in sorted(folder.glob("*.json"))):
        try:
            found.append(read(path))
        except ValueError as e:
            warnings.warn(f"{e}; its launch settings are not used", RuntimeWarning, stacklevel=2)
    return found


def _entries(name: str | None, arch: str, kind: str, dtype: str) -> list[dict]:
    """Those of the first table that has any, of the GPU of that name, else of that architecture."""
    for key, value in (("gpu", name), ("arch", arch)):
        for table in tables():
            found = [e for e in table["settings"].get(kind, ()) if e["dtype"] == dtype]
            if table[key] == value and found:
                return found
    return []


@functools.cache
def _gpu(device: torch.device) -> tuple[str, str]:
    """Its name and its architecture."""
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"


def distance(a: tuple, b: tuple) -> float:
    """Between two shapes, in log space; infinite from a factor of 4 in one size on."""
    steps = [abs(math.log2(m / n)) for m, n in zip(a, b, strict=True)]
    return math.inf if max(steps) >= 2 else sum(s * s for s in steps)


@functools.lru_cache(maxsize=4096)
def _nearest(name: str | None, arch: str, kind: str, dtype: str, shape: tuple) -> dict | None:
    entries = _entries(name, arch, kind, dtype)
    if kind.startswith("attention"):  # What fits one head dim need not fit another.
        entries = [e for e in entries if tuple(e["shape"]) == shape]
    best = min(entries, key=lambda e: distance(e["shape"], shape), default=None)
    return best["settings"] if best and distance(best["shape"], shape) < math.inf else None


def settings(kind: str, like: torch.Tensor, shape: tuple[int, ...]) -> dict | None:
    """What was measured to be fastest for a launch of ``kind`` on tensors such as ``like``."""
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
    """Launches of ``kind`` inside take these settings; None: what the rule says."""
    _overridden[kind] = chosen
    try:
        yield
    finally:
        del _overridden[kind]
