"""Measure our matrix products beside torch's on this CPU: ``python -m llmos_kernels tune``.

``ops/_product_measurements.py`` reads what this writes. Each product is timed in turn with torch's
on weights that together exceed the caches, as the layers of a model do, until an interval of 95 %
of the ratio decides who is faster. Sizes come in order of their multiply-accumulates (MACs), so
that only the largest are missing if the time is over; then the nearest that was measured answers.
"""

import functools
import itertools
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from llmos_kernels._core import registry
from llmos_kernels._core.timing import interval, samples
from llmos_kernels._core.tuned import RULES, folders
from llmos_kernels._tools import checksums, other_processes
from llmos_kernels.ops import _cpu_facts, _products, linear
from llmos_kernels.ops import _product_measurements as measurements
from llmos_kernels.ops._activations import NONE, RELU
from llmos_kernels.ops._product_policy import OURS, TORCH, override

#: The sizes whose products are measured, up to so many multiply-accumulates.
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
WIDTHS = (128, 384, 768, 1536, 4096)
MAX_MACS = 1 << 31
#: Elements of the weights between which calls alternate, and how many weights there are at most.
_POOL_ELEMENTS, _MAX_COPIES = 1 << 25, 32
#: Rounds of one comparison, about how long one sample takes, and the longest comparison.
_ROUNDS, _SAMPLE_SECONDS, _MAX_SECONDS = 15, 3e-4, 0.35
#: So many rounds decide if each differs by this factor, else so many that an interval can.
_CLEAR_ROUNDS, _CLEAR_FACTOR, _INTERVAL_ROUNDS = 3, 1.15, 6
#: A slower side that is left behind by so much and takes so long is not timed at larger sizes.
_HOPELESS_FACTOR, _HOPELESS_SECONDS = 3.0, 20e-3

Call = Callable[[], object]


class Comparison(NamedTuple):
    """Median times in seconds of our product and of torch's, and which was decided to be faster."""

    ours: float
    torch: float
    faster: str | None


def _verdict(ours: Sequence[float], theirs: Sequence[float]) -> str | None:
    """Return which of two lists of times, taken in turn, is lower; None if that is not decided."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    clear = min(ratios) > _CLEAR_FACTOR or max(ratios) < 1 / _CLEAR_FACTOR
    if not clear and len(ratios) < _INTERVAL_ROUNDS:
        return None
    low, high = interval(ratios)
    return "ours" if low > 1 else "torch" if high < 1 else None


def _is_hopeless(found: Comparison) -> bool:
    """Return True if one side is so slow that it is not timed at larger sizes."""
    low, high = sorted((found.ours, found.torch))
    return high > max(_HOPELESS_FACTOR * low, _HOPELESS_SECONDS)


def compare(ours: Call, theirs: Call) -> Comparison:
    """Time our product and torch's in turn, until it is decided which is faster or time is over."""
    taken = samples(
        (ours, theirs),
        _ROUNDS,
        _SAMPLE_SECONDS,
        _MAX_SECONDS,
        _CLEAR_ROUNDS,
        lambda times: _verdict(*times) is not None,
    )
    ours_median, torch_median = map(statistics.median, taken)
    return Comparison(ours_median, torch_median, _verdict(*taken))


def sizes() -> list[tuple[int, int, int]]:
    """Return the [rows, depth, width] that are measured, the smallest products first."""
    listed = itertools.product(ROWS, WIDTHS, WIDTHS)
    return sorted((s for s in listed if math.prod(s) <= MAX_MACS), key=math.prod)


class _Inputs:
    """Views of one buffer of random numbers, of [rows, depth] by [depth, width]."""

    def __init__(self, pool: Tensor, rows: int, depth: int, width: int):
        self.x, self.dz, self.saved = (
            pool[: rows * n].view(rows, n) for n in (depth, width, depth)
        )
        self.bias = pool[:width]
        self.weights = itertools.cycle(self._copies(pool, width, depth))
        self.inputs = itertools.cycle(self._copies(pool, rows, depth))

    @staticmethod
    def _copies(pool: Tensor, rows: int, columns: int) -> list[Tensor]:
        size = rows * columns
        count = min(pool.numel() // size, _MAX_COPIES)
        return [pool[i * size :][:size].view(rows, columns) for i in range(count)]


def _forward(given: _Inputs) -> tuple[Call, Call]:
    x, bias, weights = given.x, given.bias, given.weights
    return (
        lambda: linear._compute(x, next(weights), bias, NONE, None, True, OURS),
        lambda: F.linear(x, next(weights), bias),
    )


def _dinput(given: _Inputs) -> tuple[Call, Call]:
    return (
        lambda: _products.linear_dinput(given.dz, next(given.weights), None, NONE, 0.0, None),
        lambda: given.dz @ next(given.weights),
    )


def _dinput_activation(given: _Inputs) -> tuple[Call, Call]:
    epilogue = given.saved, RELU, 0.0, None

    def theirs() -> None:
        dinput = given.dz @ next(given.weights)
        _products.sum_of_rows(_products.activation_backward(dinput, *epilogue))

    return lambda: _products.linear_dinput(given.dz, next(given.weights), *epilogue), theirs


def _dweight(given: _Inputs) -> tuple[Call, Call]:
    def theirs() -> None:
        given.dz.mT @ next(given.inputs)
        _products.sum_of_rows(given.dz)

    return lambda: _products.linear_dweight(given.dz, next(given.inputs), True), theirs


def _layer(given: _Inputs) -> tuple[Call, Call]:
    def step(layer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        leaves = given.x, next(given.weights), given.bias
        x, weight, bias = (t.detach().requires_grad_() for t in leaves)
        with torch.enable_grad():
            torch.autograd.grad(layer(x, weight, bias), (x, weight, bias), given.dz)

    return lambda: step(linear.project), lambda: step(F.linear)


#: How a product is called, ours and torch's. That of a whole layer asks for the others' answers.
DIRECTIONS: dict[str, Callable[[_Inputs], tuple[Call, Call]]] = {
    measurements.FORWARD: _forward,
    measurements.DINPUT: _dinput,
    measurements.DINPUT_ACTIVATION: _dinput_activation,
    measurements.DWEIGHT: _dweight,
    measurements.LAYER: _layer,
}


def _pools(dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, Tensor]:
    """Return a buffer of random numbers for each dtype."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(_POOL_ELEMENTS, generator=generator)
    return {dtype: numbers.to(dtype) for dtype in dtypes}


class _Grid:
    """The points of one direction and dtype, as they are measured."""

    def __init__(self, dtype: torch.dtype, direction: str):
        self.dtype, self.direction = dtype, direction
        self.library = _cpu_facts.torch_library(dtype, torch._C._get_mkldnn_enabled())
        self.provider = OURS  # Who was faster at the last size.
        self.is_complete = False
        self.points: list[tuple] = []

    def add(self, size: tuple[int, int, int], measured: Callable[[], Comparison]) -> None:
        """Add a point; the last one is that at which a side is slow beyond hope, twice."""
        found = measured()
        if _is_hopeless(found):
            found = min(found, measured(), key=lambda c: c.ours + c.torch)
        self.points.append(
            (*size, round(found.ours * 1e6, 2), round(found.torch * 1e6, 2), found.faster)
        )
        self.provider = self.library if found.faster == TORCH else OURS
        self.is_complete = _is_hopeless(found)

    def content(self) -> dict[str, Any]:
        """Return the grid as a file has it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "direction": self.direction,
            "dtype": dtype,
            "torch_library": self.library,
            "points": self.points,
        }


def measure(
    dtypes: Sequence[torch.dtype], seconds: float, step: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """Return the grids of all directions and ``dtypes``, as a file has them.

    Args:
        dtypes: The dtypes of the products.
        seconds: Sizes that are left after this time are not measured, but at least one is.
        step: Called after each size.
    """
    end = time.perf_counter() + seconds
    pools = _pools(dtypes)
    grids = [_Grid(dtype, direction) for dtype, direction in itertools.product(dtypes, DIRECTIONS)]
    for size in sizes():
        inputs = {dtype: _Inputs(pool, *size) for dtype, pool in pools.items()}
        for grid in grids:
            if not grid.is_complete:
                answers = {g.direction: g.provider for g in grids if g.dtype == grid.dtype}
                calls = DIRECTIONS[grid.direction](inputs[grid.dtype])
                with override(answers):
                    grid.add(size, functools.partial(compare, *calls))
        step()
        if time.perf_counter() > end:
            break
    return [grid.content() for grid in grids]


def machine() -> dict[str, Any]:
    """Return what a file says of this machine: the facts that have to match, and what to read."""
    facts = _cpu_facts.cpu()._asdict() | {"threads": torch.get_num_threads()}
    config = torch.__config__.show()
    mkl = re.search(r"Math Kernel Library Version (\S+)", config)
    onednn = re.search(r"MKL-DNN v(\S+)", config)
    return {
        "model": _cpu_facts.model_name(),
        **{name: facts[name] for name in measurements.FACTS},
        "torch": torch.__version__,
        "mkl": mkl and mkl[1],
        "onednn": onednn and onednn[1],
    }


def default_path(about: dict[str, Any]) -> Path:
    """Return the file for a machine, in the user's folder if there is one, else the package's."""
    known = {k: "unknown" if v is None else v for k, v in about.items()}
    name = "{vendor}-family{family}-{isa}-{threads}threads.json".format_map(known)
    return folders()[0] / "cpu" / name


def _check_writable(folder: Path) -> None:
    """Create ``folder`` if it is missing; raise ValueError if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ValueError(
            f"cannot write to {folder}: {e.strerror}; LLMOS_TUNED or --output names another folder"
        ) from e


def _measured_before(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the grids of a file that is there already.

    Raises:
        ValueError: They were measured on another machine, or with torch limited to another ISA.
    """
    if not path.exists():
        return []
    try:
        found = measurements.read(path)
    except ValueError:
        return []  # It is of no use to anybody, and replaced.
    other = {k: v for k in measurements.FACTS if (v := found["machine"][k]) != about[k]}
    if other:
        theirs = ", ".join(f"{k} {v}, here {about[k]}" for k, v in other.items())
        raise ValueError(f"{path} is of another machine ({theirs}): --output names another file")
    return found["products"]


def _merged(before: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the grids ``new``, and what was there ``before`` and was not measured again."""

    def key(grid: dict[str, Any]) -> tuple[str, ...]:
        return grid["dtype"], grid["direction"], grid["torch_library"]

    merged = {key(grid): grid for grid in before}
    for grid in new:
        points = {tuple(p[:3]): p for p in merged.get(key(grid), {}).get("points", ())}
        points |= {tuple(p[:3]): p for p in grid["points"]}
        merged[key(grid)] = grid | {
            "points": sorted(points.values(), key=lambda p: math.prod(p[:3]))
        }
    return list(merged.values())


def tune_this_cpu(dtypes: Sequence[torch.dtype], path: Path | None, seconds: float) -> bool:
    """Measure the products of this CPU and write them. Return False if Ctrl-C ended it early.

    What a file has of this machine already is kept where nothing new is measured.

    Args:
        dtypes: The dtypes of the products.
        path: The JSON file to write; by default one named after the CPU, in the first folder with
            settings.
        seconds: About how long to measure.

    Raises:
        ValueError: There is no C++ extension, ``seconds`` is negative or not finite, ``path`` is a
            folder, a file of another machine, or named as a file of rules is, or its folder cannot
            be written to.
    """
    about = machine()
    if about["isa"] == "none" or registry._FORCED:
        raise ValueError(
            "tune --device cpu compares our C++ kernels with torch's: they are not built, or"
            " LLMOS_BACKEND is set"
        )
    if not 0 <= seconds < math.inf:
        raise ValueError(f"--seconds must be at least 0 and finite, got {seconds}")
    path = path or default_path(about)
    if path.is_dir() or path.name.startswith(RULES):
        raise ValueError(
            f"--output must name a file that does not begin with {RULES!r}, as rules do, got {path}"
        )
    _check_writable(path.parent)
    before = _measured_before(path, about)
    watch = other_processes.Watch([os.getpid()])
    time.sleep(0.5)
    if (why := watch.disturbed()) is not None:
        print(f"times will be wrong: {why}", file=sys.stderr)
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with torch.no_grad(), Progress(*columns) as progress:
            task = progress.add_task("sizes of products", total=len(sizes()))
            grids = measure(dtypes, seconds, lambda: progress.advance(task))
    except KeyboardInterrupt:
        print("interrupted; nothing is written")
        return False
    grids = _merged(before, grids)
    measurements.write(path, about, checksums.commit().removeprefix("of "), grids)
    print(path)
    return True
