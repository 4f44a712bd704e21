"""Report what nvcc has made of the kernels in ``csrc/cuda``: registers, spills, width of accesses.

It reads the CUDA part of this installation, or any other object that cuobjdump takes.
"""

import fnmatch
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

from llmos_kernels._tools import machine_code

#: The CUDA part of this installation.
LIBRARY = Path(__file__).parents[1] / "_ops_cuda.so"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture."""

    name: str
    registers: int  # Per thread.
    stack: int  # Bytes of local memory per thread: spills and arrays that are not in registers.
    shared: int  # Bytes of shared memory.
    instructions: Counter[str]  # By kind, see ``machine_code``.

    @property
    def vectors(self) -> str:
        """Bits per thread of global loads, then of stores: ``128 x 4, 32 x 1; 128 x 2``."""
        return machine_code.vectors(self.instructions)


def kernels(library: Path, arch: str) -> Iterator[Compiled]:
    """Yield the kernels of ``library`` that are compiled for ``arch``, such as "sm_90"."""
    usage, sass = (_dump(library, option, arch) for option in ("-res-usage", "-sass"))
    code = dict(_parts(re.split(r"\n\t\tFunction : (\S+)\n", sass)))
    for name, line in _parts(re.split(r"\n Function (\S+):\n", usage)):
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)
        if found and name in code:
            registers, stack, shared = map(int, found.groups())
            counts = machine_code.counted(code[name])
            yield Compiled(_plain(name), registers, stack, shared, counts)


def _parts(split: list[str]) -> Iterator[tuple[str, str]]:
    return zip(split[1::2], split[2::2], strict=True)


def _dump(library: Path, option: str, arch: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, "-arch", arch, option, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _plain(symbol: str) -> str:
    """Return the name of a kernel with its template arguments; the symbol without c++filt."""
    if shutil.which("c++filt") is None:
        return symbol
    command = ["c++filt", "--no-params", symbol]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return re.sub(r"llmos::|c10::|\(anonymous namespace\)::|_GLOBAL__N_\w+::|^void ", "", name)


def print_table(arch: str, pattern: str = "*", library: Path = LIBRARY) -> None:
    """Print a line for each kernel, or one on why there is none.

    Args:
        arch: such as "sm_90".
        pattern: of the names of kernels, which begin with "cuda:" here.
        library: what has them.
    """
    found = list(kernels(library, arch)) if library.exists() else []
    if not found:
        what = f"has no code for {arch}" if library.exists() else "is not built"
        print(f"CUDA C++: {library.name} {what} (TORCH_CUDA_ARCH_LIST)")
        return
    chosen = [k for k in found if fnmatch.fnmatch(f"cuda:{k.name}", pattern)]
    if not chosen:
        return
    print(f"CUDA C++ on {arch}; global loads; global stores: bits per thread x instructions")
    print("regs  stack  shared  kernel; loads; stores")
    for k in sorted(chosen, key=lambda k: k.name):
        print(f"{k.registers:4} {k.stack:6} {k.shared:7}  cuda:{k.name}; {k.vectors}")
