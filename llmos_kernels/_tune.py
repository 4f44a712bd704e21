"""Measures launch settings on a GPU: ``python -m llmos_kernels tune``; what ``_triton/tuned.py`` reads.

Each setting is timed as a CUDA graph of calls on inputs that together exceed the L2 cache, so that
each call finds its own cold. A setting is kept where its result agrees with the rule's and it is
faster by more than noise.
"""

import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from llmos_kernels import _device_time as device_time
from llmos_kernels._triton import (
    attention,
    attention_backward,
    examples,
    int8,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
    tuned,
)
from llmos_kernels.ops._activations import GELU
from llmos_kernels.ops._attention_arguments import NOT_CAUSAL

#: A setting that is not faster than the rule by so much is noise.
GAIN = 0.03


@dataclass(frozen=True)
class Work:
    """A launch to be tuned: what it is called, its key, its launcher, and what makes arguments."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    launcher: Callable
    make: Callable[[], tuple]
    candidates: Sequence[dict]


def _product(names: str, *values: Sequence) -> list[dict]:
    return [dict(zip(names.split(), v, strict=True)) for v in itertools.product(*values)]


ROWS = _product("ROWS num_warps", (1, 2, 4, 8), (1, 2, 4, 8, 16))
TILES = _product(
    "BLOCK_M BLOCK_N num_warps num_stages", (32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
)
DECODE = _product(
    "BLOCK_M BLOCK_N num_warps num_stages", (16,), (32, 64, 128), (2, 4, 8), (2, 3, 4)
)
INT8 = _product(
    "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages", (64, 128), (64, 128, 256), (64, 128), (4, 8), (3, 4)
)  # fmt: skip
_BLOCKS = "persistent BLOCK_M BLOCK_N BLOCK_K num_warps num_stages"
PRODUCTS = _product(_BLOCKS, (0,), (64, 128), (64, 128), (32, 64), (4, 8), (3, 4))
PRODUCTS += _product(_BLOCKS, (1,), (128,), (128, 256), (64,), (8,), (3, 4))
FEW_ROWS = _product(_BLOCKS, (0,), (16,), (16, 32, 64), (64, 128, 256), (2, 4), (3, 4, 5))


def _own_rows(rows: str, dtype: torch.dtype, d: int) -> list[dict]:
    """TILES where each warp has 16 rows of its own; all where tensor cores or registers do not allow it."""
    free = dtype == torch.float32 or d > 128
    return [c for c in TILES if free or c[rows] >= 16 * c["num_warps"]]


def _norms(empty: Callable, dtype: torch.dtype) -> Iterator[Work]:
    for d in examples.WIDTHS:

        def forward(d=d):
            weight = empty(d)
            return empty(8192, d), weight, weight, d, 1e-5, True

        def backward(d=d):
            x, weight, *_ = forward(d)
            stats = layer_norm.forward(x, weight, weight, d, 1e-5, True)[1]
            return x, None, x, weight, stats, d, True, 0.0, None, True, True

        yield Work("layer_norm", dtype, (d,), layer_norm.forward, forward, ROWS)
        launcher = layer_norm_backward.backward
        yield Work("layer_norm backward", dtype, (d,), launcher, backward, ROWS)


def _attention(empty: Callable, dtype: torch.dtype) -> Iterator[Work]:
    def tensors(d, padded, batch=4, heads=16, queries=2048, keys=2048):
        of = lambda n: empty(batch, n, heads, d).transpose(1, 2)
        q, k, v = of(queries), of(keys), of(keys)
        mask = torch.arange(keys, device=q.device).expand(batch, -1) >= keys * 3 // 4
        return q, k, v, None, mask if padded else None, None, None

    def options(d, dropout_p=0.0):
        seed = torch.tensor([1, 2], device=empty(1).device)
        return d**-0.5, NOT_CAUSAL, dropout_p, seed

    def forward(d, load):
        return *tensors(d, load != ""), *options(d, 0.1 * (load == " dropout"))

    def backward(d, load):
        args = forward(d, load)
        return args[0], *args[:7], *attention.forward(*args), *args[7:], False

    def decode(d):
        return *tensors(d, False, 8, 32, 1, 4096), *options(d)

    for d in (64, 128, 256):
        by_queries, by_keys = (_own_rows(rows, dtype, d) for rows in ("BLOCK_M", "BLOCK_N"))
        for load in ("", " masked", " dropout"):
            make = functools.partial(forward, d, load)
            yield Work(f"attention forward{load}", dtype, (d,), attention.forward, make, by_queries)
            make = functools.partial(backward, d, load)
            for name, tiles in (("dquery", by_queries), ("dkey", by_keys)):
                kind = f"attention {name}{load}"
                yield Work(kind, dtype, (d,), attention_backward.backward, make, tiles)
        make = functools.partial(decode, d)
        yield Work("attention decode", dtype, (d,), attention.forward, make, DECODE)


def _linear(empty: Callable, dtype: torch.dtype) -> Iterator[Work]:
    def forward(rows, d, hidden):
        return empty(rows, d), empty(hidden, d), empty(hidden), GELU, 0.0, None, False

    def dinput(rows, d, hidden):
        return empty(rows, d), empty(d, hidden), empty(rows, hidden), GELU, 0.0, None

    for rows, (d, hidden) in itertools.product(examples.ROWS, examples.FEED_FORWARDS):
        shape, candidates = (rows, hidden, d), FEW_ROWS if rows <= 16 else PRODUCTS
        make = functools.partial(forward, rows, d, hidden)
        yield Work("linear", dtype, shape, linear.forward, make, candidates)
        if rows > 16:
            make = functools.partial(dinput, rows, d, hidden)
            yield Work("linear dinput", dtype, shape, linear_backward.dinput, make, candidates)


def _int8(empty: Callable, dtype: torch.dtype) -> Iterator[Work]:
    def make(rows, d, hidden, threshold):
        weight, scale = int8.quantize(empty(hidden, d))
        return empty(rows, d), weight, scale, None, empty(hidden), GELU, threshold

    few = [{k: v for k, v in c.items() if k != "persistent"} for c in FEW_ROWS]
    few = [c for c in few if c["BLOCK_K"] >= 128]
    for rows, (d, hidden) in itertools.product(examples.ROWS, examples.FEED_FORWARDS):
        for kind, threshold in (("int8", 0.0), ("int8 outliers", 6.0)):
            args = functools.partial(make, rows, d, hidden, threshold)
            candidates = INT8 if rows > 16 else few
            yield Work(kind, dtype, (rows, hidden, d), int8.linear, args, candidates)


#: What ``--op`` chooses from.
OPS: dict[str, Callable[[Callable, torch.dtype], Iterator[Work]]] = {
    "layer_norm": _norms, "attention": _attention, "linear": _linear, "int8": _int8,
}  # fmt: skip


def graph_seconds(launcher: Callable, args: tuple) -> float:
    """The device's time for a call, from a cold L2: the median of replays of a CUDA graph."""
    rounds = device_time.cold(args)
    graph = device_time.captured([functools.partial(launcher, *given) for given in rounds])
    times = [device_time.seconds(graph.replay) / len(rounds) for _ in range(12)]
    return statistics.median(times[2:])


def _outputs(work: Work, args: tuple) -> list[Tensor]:
    made = work.launcher(*args)
    return [t.float() for t in (made if isinstance(made, tuple) else (made,))]


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether another order of sums can be all that differs."""
    eps = torch.finfo(dtype).eps
    return all(
        torch.equal(a.isfinite(), b.isfinite())
        and bool(((a - b).nan_to_num().abs() <= 8 * eps * b.nan_to_num().abs().max()).all())
        for a, b in zip(found, expected, strict=True)
        if b.numel()
    )


def tune(work: Work, seconds: Callable[[Callable, tuple], float]) -> dict:
    """The entry for a launch: its fastest settings, None where the rule's are as fast."""
    args = work.make()
    with tuned.override(work.kind, None):
        expected, rule = _outputs(work, args), seconds(work.launcher, args)
    best, chosen = rule, None
    for candidate in work.candidates:
        with tuned.override(work.kind, candidate):
            try:
                if not _agree(_outputs(work, args), expected, work.dtype):
                    continue
                taken = seconds(work.launcher, args)
            except OutOfResources:
                continue
        if taken < best:
            best, chosen = taken, candidate
    if best > rule * (1 - GAIN):
        best, chosen = rule, None
    return {
        "dtype": str(work.dtype).removeprefix("torch."), "shape": list(work.shape), "settings": chosen,
        "us": best * 1e6, "rule_us": rule * 1e6,
    }  # fmt: skip


def write(path: Path, about: dict, kind: str, entry: dict) -> None:
    """The table in ``path`` with an entry, in the place of an older one of that dtype and shape. In one
    step: an interrupted writer leaves the table that there was."""
    table = tuned.read(path)["settings"] if path.exists() else {}
    same = lambda e: (e["dtype"], e["shape"]) == (entry["dtype"], entry["shape"])
    table[kind] = [e for e in table.get(kind, ()) if not same(e)] + [entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(
        json.dumps({"format": tuned.FORMAT, **about, "settings": table}, indent=1) + "\n"
    )
    draft.replace(path)


def run(
    ops: Sequence[str], dtypes: Sequence[torch.dtype], path: Path, about: dict, device: str = "cuda",
    seconds: Callable[[Callable, tuple], float] = graph_seconds,
) -> bool:  # fmt: skip
    """Tune ``ops`` and write ``path`` after each launch; whether it came to its end.

    ``about`` is the GPU, its architecture, and versions. Ctrl-C keeps what is written.
    """
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        try:
            for op, dtype in itertools.product(ops, dtypes):
                name = str(dtype).removeprefix("torch.")
                empty = lambda *shape, dtype=dtype: torch.randn(shape, device=device).to(dtype)
                listed = list(OPS[op](empty, dtype))
                for work in progress.track(listed, description=f"{op} {name}"):
                    write(path, about, work.kind, tune(work, seconds))
        except KeyboardInterrupt:
            return False
    return True
