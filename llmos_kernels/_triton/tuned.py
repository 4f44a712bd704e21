"""Launch settings that were measured on GPUs: ``tuned/*.json``, as ``python -m llmos_kernels tune`` writes them.

Looked up by the GPU's name, else its architecture; then by the nearest shape, in log space, that is
less than a factor of 4 away in every size. Where there is none the rules of the launchers decide.
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
FOLDER = Path(__file__).parent.parent / "tuned"
#: What an entry may set, all integers: sizes of tiles and launch options.
NAMES = frozenset(
    ("ROWS", "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "maxnreg", "persistent")
)
#: The architecture whose settings hold for tensors on the CPU, when kernels are compiled ahead of time.
planned: str | None = None
_overridden: dict[str, dict] = {}


def folders() -> list[Path]:
    own = os.environ.get("LLMOS_TUNED")
    return [*([Path(own)] if own else []), FOLDER]


def read(path: Path) -> dict:
    """The settings in ``path``. Raises ValueError naming the file, and what is wrong with it."""
    try:
        table = json.loads(path.read_text())
        if table["format"] != FORMAT:
            raise ValueError(f"of format {table['format']}, expected {FORMAT}")
        for kind, entries in table["settings"].items():
            for entry in entries:
                unknown = entry["settings"].keys() - NAMES
                if unknown or not all(type(v) is int for v in entry["settings"].values()):
                    raise ValueError(f"{kind}: settings {entry['settings']}")
                if not all(type(n) is int and n > 0 for n in entry["shape"]):
                    raise ValueError(f"{kind}: shape {entry['shape']}")
                if not hasattr(torch, entry["dtype"]):
                    raise ValueError(f"{kind}: dtype {entry['dtype']}")
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


@functools.cache
def _for_gpu(name: str | None, arch: str) -> dict[str, list]:
    """The settings of a GPU of that name, else of that architecture; else none."""
    for key, value in (("gpu", name), ("arch", arch)):
        for table in tables():
            if table[key] == value:
                return table["settings"]
    return {}


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
    entries = [e for e in _for_gpu(name, arch).get(kind, ()) if e["dtype"] == dtype]
    best = min(entries, key=lambda e: distance(e["shape"], shape), default=None)
    return best["settings"] if best and distance(best["shape"], shape) < math.inf else None


def settings(kind: str, like: torch.Tensor, shape: tuple[int, ...]) -> dict | None:
    """What was measured to be fastest for a launch of ``kind`` on tensors such as ``like``."""
    if kind in _overridden:
        return _overridden[kind]
    if not tables():
        return None
    name, arch = _gpu(like.device) if like.is_cuda else (None, planned)
    if arch is None:
        return None
    return _nearest(name, arch, kind, str(like.dtype).removeprefix("torch."), shape)


@contextlib.contextmanager
def override(kind: str, chosen: dict) -> Iterator[None]:
    """Launches of ``kind`` inside take these settings."""
    _overridden[kind] = chosen
    try:
        yield
    finally:
        del _overridden[kind]
