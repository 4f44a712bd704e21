"""Measured times of matrix products on CPUs, ours beside torch's, in ``tuned/cpu/*.json``.

``python -m llmos_kernels tune --device cpu`` writes a file. It holds for the machine that it
describes: the vendor and family of the CPU, the instruction sets of our kernels and of torch's, and
the number of threads. For each direction, dtype and library of torch's it has a grid of points
``[rows, depth, width, ours_us, torch_us, faster]``; ``faster`` is "ours", "torch", or null where
the interval of their ratio does not decide. The point nearest in log2 of the three sizes answers.
``layer`` is the forward and backward of a whole ``nn.Linear``.
"""

import datetime
import functools
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from llmos_kernels._core.tuned import RULES, folders, missing_folder
from llmos_kernels.ops._cpu_facts import ATEN, MKL, ONEDNN

__all__: list[str] = []

FORWARD, DINPUT, DINPUT_ACTIVATION = "forward", "dinput", "dinput_activation"
DWEIGHT, LAYER = "dweight", "layer"
DIRECTIONS = (FORWARD, DINPUT, DINPUT_ACTIVATION, DWEIGHT, LAYER)

FORMAT = 1
COLUMNS = ("rows", "depth", "width", "ours_us", "torch_us", "faster")
#: The fields of ``machine`` that have to be those of the machine that asks. It has others, to read.
FACTS = ("vendor", "family", "isa", "amx", "torch_isa", "threads")
FASTER = ("ours", "torch", None)
#: Sizes are rounded to so many parts of an octave before they are looked up.
_PARTS = 8


class Point(NamedTuple):
    """One measured product."""

    rows: int
    depth: int
    width: int
    ours_us: float
    torch_us: float
    faster: str | None


@dataclass(frozen=True, eq=False)
class Grid:
    """The points of one direction, dtype and library of torch's, and the file that has them."""

    torch_library: str
    points: tuple[Point, ...]
    path: Path
    date: datetime.date
    commit: str

    def faster(self, rows: int, depth: int, width: int) -> str | None:
        """Return "ours" or "torch", whichever was faster at the nearest point; None for a tie."""
        return self._nearest(rows, depth, width).faster

    def times(self, rows: int, depth: int, width: int) -> tuple[float, float]:
        """Return about how many microseconds ours takes, and torch's, by the nearest point."""
        point = self._nearest(rows, depth, width)
        scale = rows * depth * width / math.prod(point[:3])
        return point.ours_us * scale, point.torch_us * scale

    def _nearest(self, rows: int, depth: int, width: int) -> Point:
        sizes = (round(math.log2(max(n, 1)) * _PARTS) for n in (rows, depth, width))
        return _nearest(self, *sizes)


@functools.lru_cache(maxsize=4096)
def _nearest(grid: Grid, rows: int, depth: int, width: int) -> Point:
    """Return the point nearest to sizes that are given as log2, in parts of an octave."""

    def distance(point: Point) -> float:
        sizes = zip(point[:3], (rows, depth, width), strict=True)
        return sum((math.log2(n) - wanted / _PARTS) ** 2 for n, wanted in sizes)

    return min(grid.points, key=distance)


def _check_point(point: Sequence) -> None:
    """Raise ValueError if ``Grid`` could not use ``point``."""
    *sizes, ours, theirs, faster = point
    if len(point) != len(COLUMNS) or not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(f"point {point}, expected {list(COLUMNS)}")
    if not all(isinstance(us, int | float) and us > 0 for us in (ours, theirs)):
        raise ValueError(f"point {point}: times must be above 0")
    if faster not in FASTER:
        raise ValueError(f"point {point}: faster {faster!r}, expected one of {FASTER}")


def _check_grid(grid: dict) -> None:
    """Raise ValueError for a grid whose direction, dtype, library or points are not usable."""
    if grid["direction"] not in DIRECTIONS:
        raise ValueError(f"direction {grid['direction']!r}, expected one of {DIRECTIONS}")
    if not isinstance(getattr(torch, str(grid["dtype"]), None), torch.dtype):
        raise ValueError(f"dtype {grid['dtype']!r}")
    if grid["torch_library"] not in (ONEDNN, MKL, ATEN):
        raise ValueError(f"torch_library {grid['torch_library']!r}")
    if not grid["points"]:
        raise ValueError(f"{grid['dtype']} {grid['direction']} has no points")
    for point in grid["points"]:
        _check_point(point)


def read(path: Path) -> dict:
    """Return the content of a file of measured times.

    Raises:
        ValueError: The file cannot be read or is malformed; the message names it.
    """
    try:
        table = json.loads(path.read_text())
        if table["format"] != FORMAT:
            raise ValueError(f"has format {table['format']}, expected {FORMAT}")
        missing = [name for name in FACTS if name not in table["machine"]]
        if missing:
            raise ValueError(f"machine lacks {missing}")
        datetime.date.fromisoformat(table["date"])
        if not isinstance(table["commit"], str):
            raise ValueError(f"commit {table['commit']!r}, expected a string")
        for grid in table["products"]:
            _check_grid(grid)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from e
    return table


@functools.cache
def tables() -> list[tuple[Path, dict]]:
    """Return every readable file, the user's first; warn of each that is not."""
    found = []
    if missing := missing_folder():
        text = f"LLMOS_TUNED: {missing} is no folder; the settings of the package are used"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    for path in (p for folder in folders() for p in sorted((folder / "cpu").glob("*.json"))):
        if path.name.startswith(RULES):  # Which ``_product_policy`` reads.
            continue
        try:
            found.append((path, read(path)))
        except ValueError as e:
            warnings.warn(f"{e}; its measured times are not used", RuntimeWarning, stacklevel=2)
    return found


def grids(dtype: torch.dtype, library: str, facts: dict) -> dict[str, Grid]:
    """Return the grid of each direction that was measured on a machine with ``facts``.

    Args:
        dtype: The dtype of the products.
        library: The library that computes torch's products of ``dtype``.
        facts: The values of ``FACTS`` here; others are ignored.
    """
    found: dict[str, Grid] = {}
    wanted = {"dtype": str(dtype).removeprefix("torch."), "torch_library": library}
    for path, table in tables():
        if any(table["machine"][name] != facts[name] for name in FACTS):
            continue
        about = path, datetime.date.fromisoformat(table["date"]), table["commit"]
        for grid in table["products"]:
            if grid["direction"] not in found and wanted.items() <= grid.items():
                points = tuple(Point(*point) for point in grid["points"])
                found[grid["direction"]] = Grid(library, points, *about)
    return found


def _grid_text(grid: dict) -> str:
    """Return a grid as JSON, one line a point."""
    head = json.dumps({k: v for k, v in grid.items() if k != "points"})
    points = ",\n  ".join(json.dumps(point) for point in grid["points"])
    return f'{head[:-1]}, "points": [\n  {points}\n ]}}'


def write(path: Path, machine: dict, commit: str, products: list[dict]) -> None:
    """Write a file of measured times, dated today.

    The file is replaced atomically: if the writer is interrupted, the previous file remains.
    """
    date = datetime.date.today().isoformat()
    about = {"format": FORMAT, "machine": machine, "date": date, "commit": commit}
    head = json.dumps(about | {"columns": COLUMNS}, indent=1)
    grids = ",\n ".join(_grid_text(grid) for grid in products)
    draft = path.with_suffix(".draft")
    draft.write_text(f'{head[:-2]},\n "products": [\n {grids}\n ]\n}}\n')
    draft.replace(path)
