"""Compile the launches of ``tune`` in several processes, into Triton's cache on disk.

Otherwise most of the tuning time would be compilation, on one core while the GPU is idle.

    python -m llmos_kernels._tools.tune_precompile sm_90 bfloat16 attention 3 16    # part 3 of
    parts 0 to 15
"""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from llmos_kernels._tools import tune_jobs
from llmos_kernels._tools.build_pack import Launch, launch_of, planned_for
from llmos_kernels._triton.runtime import settings
from llmos_kernels._triton.runtime.launch import Kernel


def compile_part(op: str, dtype: torch.dtype, arch: str, part: int, parts: int) -> int:
    """Compile one of ``parts`` equal shares of the launches of ``op``; return how many failed.

    The kernels are specialised as in a real call, with uninitialised tensors on the CPU as
    arguments.
    """
    seen: set[Launch] = set()
    failed: list[Launch] = []

    def warm(self: Kernel, grid: tuple[int, ...], args: tuple, kwargs: dict[str, Any]) -> None:
        launch = launch_of(self, args, dict(kwargs))
        if launch in seen:
            return
        seen.add(launch)
        if len(seen) % parts != part:
            return
        try:
            self.run(*args, grid=grid, warmup=True, **kwargs)
        except Exception as e:  # Tuning meets the same error, and skips the candidate or raises.
            failed.append(launch)
            print(f"{launch}: {type(e).__name__}: {e}", file=sys.stderr)

    empty = lambda *shape: torch.empty(shape, dtype=dtype)
    with mock.patch.object(Kernel, "launch", warm), planned_for(arch):
        for job in tune_jobs.OPS[op](empty, dtype):
            args = job.make()
            for candidate in (None, *job.candidates):
                with settings.override(job.kind, candidate):
                    job.launcher(*args)
    return len(failed)


def compile_all(
    ops: Sequence[str], dtypes: Sequence[torch.dtype], arch: str, processes: int
) -> bool:
    """Compile all launches of tuning ``ops`` with that many processes. Return False on Ctrl-C."""
    for op in ops:
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            command = [sys.executable, "-m", __name__, arch, name, op]
            parts = [
                subprocess.Popen([*command, str(i), str(processes)], stdin=subprocess.DEVNULL)
                for i in range(processes)
            ]
            try:
                for part in parts:
                    part.wait()
            except KeyboardInterrupt:
                return False
            finally:
                for part in parts:
                    part.kill()
                    part.wait()
    return True


if __name__ == "__main__":
    arch, dtype, op, part, parts = sys.argv[1:]
    torch.set_num_threads(1)
    compile_part(op, getattr(torch, dtype), arch, int(part), int(parts))
