"""Measure launch settings on this GPU: ``python -m llmos_kernels tune``.

``_triton/runtime/settings.py`` reads what this writes. A setting is timed as a CUDA graph of calls
on inputs that together exceed the L2 cache, so that no call finds its inputs there. It is written
only if its result agrees with the launch rule's and it is faster by more than noise.
"""

import functools
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from triton.runtime.errors import OutOfResources

from llmos_kernels._core.tuned import folders
from llmos_kernels._tools import device_time, tune_precompile
from llmos_kernels._tools.tune_jobs import OPS, TuningJob
from llmos_kernels._triton.runtime import kernel_pack, settings

#: A setting must be faster than the launch rule by this fraction; less is noise.
GAIN = 0.03

#: Returns the seconds of a call, from a launcher and its arguments.
Timer = Callable[[Callable, tuple], float]


def graph_seconds(launcher: Callable, args: tuple) -> float:
    """Return the GPU seconds of a call with its inputs outside L2: a median over graph replays."""
    inputs = device_time.cold(args)
    graph = device_time.captured([functools.partial(launcher, *given) for given in inputs])
    times = [device_time.seconds(graph.replay) / len(inputs) for _ in range(12)]
    return statistics.median(times[2:])


def _outputs(job: TuningJob, args: tuple) -> list[Tensor]:
    """Return the outputs of a launch in float32."""
    out = job.launcher(*args)
    return [t.float() for t in (out if isinstance(out, tuple) else (out,))]


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Return True if the outputs differ by no more than another order of summation explains."""
    eps = torch.finfo(dtype).eps
    return all(
        torch.equal(a.isfinite(), b.isfinite())
        and bool(((a - b).nan_to_num().abs() <= 8 * eps * b.nan_to_num().abs().max()).all())
        for a, b in zip(found, expected, strict=True)
        if b.numel()
    )


def tune(job: TuningJob, seconds: Timer) -> dict[str, Any]:
    """Return the table entry of a launch: its fastest settings, None where the rule's are."""
    args = job.make()
    with settings.override(job.kind, None):
        expected, rule = _outputs(job, args), seconds(job.launcher, args)
    best, chosen = rule, None
    for candidate in job.candidates:
        with settings.override(job.kind, candidate):
            try:
                if not _agree(_outputs(job, args), expected, job.dtype):
                    continue
                taken = seconds(job.launcher, args)
            except OutOfResources:
                continue
        if taken < best:
            best, chosen = taken, candidate
    if best > rule * (1 - GAIN):
        best, chosen = rule, None
    return {
        "dtype": str(job.dtype).removeprefix("torch."),
        "shape": list(job.shape),
        "settings": chosen,
        "us": best * 1e6,
        "rule_us": rule * 1e6,
    }


def write(path: Path, about: dict[str, str], kind: str, entry: dict[str, Any]) -> None:
    """Add an entry to the table in ``path``, in place of an older one of the same dtype and shape.

    The file is replaced atomically: if the writer is interrupted, the previous table remains.
    """
    table = settings.read(path)["settings"] if path.exists() else {}
    same = lambda e: (e["dtype"], e["shape"]) == (entry["dtype"], entry["shape"])
    table[kind] = [e for e in table.get(kind, ()) if not same(e)] + [entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(
        json.dumps({"format": settings.FORMAT, **about, "settings": table}, indent=1) + "\n"
    )
    draft.replace(path)


def run(
    ops: Sequence[str],
    dtypes: Sequence[torch.dtype],
    path: Path,
    about: dict[str, str],
    device: str = "cuda",
    seconds: Timer = graph_seconds,
) -> bool:
    """Tune ``ops`` and write ``path`` after each launch. Return False if Ctrl-C ended it early.

    Args:
        ops: Names of ``OPS``.
        dtypes: The dtypes of the inputs.
        path: The JSON file; entries of other launches in it stay.
        about: The GPU, its architecture, and the versions of torch and Triton.
        device: The device of the inputs.
        seconds: The timer.
    """
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        try:
            for op, dtype in itertools.product(ops, dtypes):
                name = str(dtype).removeprefix("torch.")
                empty = lambda *shape, dtype=dtype: torch.randn(shape, device=device).to(dtype)
                jobs = list(OPS[op](empty, dtype))
                for job in progress.track(jobs, description=f"{op} {name}"):
                    write(path, about, job.kind, tune(job, seconds))
        except KeyboardInterrupt:
            return False
    return True


def tune_this_gpu(
    ops: Sequence[str], dtypes: Sequence[torch.dtype], path: Path | None, processes: int
) -> bool:
    """Compile and measure ``ops`` on the current GPU. Return False if Ctrl-C ended it early.

    Args:
        ops: Names of ``OPS``.
        dtypes: The dtypes of the inputs.
        path: The JSON file to write; by default one named after the GPU in the first settings
            folder.
        processes: How many processes compile the kernels beforehand; 0 compiles each when it is
            measured.
    """
    gpu, arch = torch.cuda.get_device_name(), kernel_pack.arch_of(0)
    about = {"gpu": gpu, "arch": arch, "torch": torch.__version__, "triton": triton.__version__}
    path = path or folders()[0] / f"{gpu.replace(' ', '_')}.json"
    if processes and not tune_precompile.compile_all(ops, dtypes, arch, processes):
        print("interrupted before anything was measured")
        return False
    done = run(ops, dtypes, path, about)
    print(f"{'' if done else 'interrupted; the results so far are in '}{path}")
    return done
