"""Compiles what ``tune`` is going to launch, in several processes, into Triton's cache on disk: most of the
time would go into that otherwise, on one core beside an idle GPU.

    python -m llmos_kernels._tools.tune_precompile sm_90 bfloat16 attention 3 16    # the fourth of 16 parts
"""

import subprocess
import sys
from collections.abc import Sequence
from unittest import mock

import torch

from llmos_kernels._tools import tune
from llmos_kernels._tools.build_pack import Launch, launch_of, planned_for
from llmos_kernels._triton.runtime import settings
from llmos_kernels._triton.runtime.launch import Kernel


def compile_part(op: str, dtype: torch.dtype, arch: str, part: int, parts: int) -> int:
    """Compile every ``parts``-th of the launches of tuning ``op``, from ``part`` on, as a call does; how
    many could not be. Tensors lie on the CPU and are not filled."""
    seen: set[Launch] = set()
    failed: list[Launch] = []

    def warm(self, grid, args, kwargs):
        launch = launch_of(self, args, dict(kwargs))
        if launch in seen:
            return
        seen.add(launch)
        if len(seen) % parts != part:
            return
        try:
            self.run(*args, grid=grid, warmup=True, **kwargs)
        except Exception as e:  # Tuning meets it again, and passes the candidate over or raises.
            failed.append(launch)
            print(f"{launch}: {type(e).__name__}: {e}", file=sys.stderr)

    empty = lambda *shape: torch.empty(shape, dtype=dtype)
    with mock.patch.object(Kernel, "launch", warm), planned_for(arch):
        for work in tune.OPS[op](empty, dtype):
            args = work.make()
            for candidate in (None, *work.candidates):
                with settings.override(work.kind, candidate):
                    work.launcher(*args)
    return len(failed)


def ahead(ops: Sequence[str], dtypes: Sequence[torch.dtype], arch: str, jobs: int) -> bool:
    """Compile for ``tune`` with ``jobs`` processes, op by op; whether it came to its end."""
    for op in ops:
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            command = [sys.executable, "-m", __name__, arch, name, op]
            parts = [
                subprocess.Popen([*command, str(i), str(jobs)], stdin=subprocess.DEVNULL)
                for i in range(jobs)
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
