"""Read compiled kernels: instructions by kind, redundant products, loads without prefetch."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
#: Instructions that load or store memory.
_MEMORY = ("LDG", "STG", "LDGSTS", "LDL", "STL", "LDS", "STS")
#: The bits per thread that a suffix of such an instruction means; without a suffix it is 32.
_WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
#: Tensor core instructions: of a warp group (Hopper), of a warp, and of Blackwell.
MATRIX = ("HGMMA", "IGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCIMMA")


def _dump(cubin: bytes, option: str) -> str:
    """Return the output of cuobjdump for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def assembled(ptx: str, arch: str) -> tuple[bytes, str]:
    """Assemble PTX for ``arch``, of the same family; return the cubin and the log of ptxas.

    Triton 3.7 passes --regAllocOptLevel=2, to work around a bug of ptxas 13. With that option some
    kernels for sm_100 and sm_120 spill 8 to 24 bytes; here ptxas runs without it.
    """
    ptx = re.sub(r"^\.target \w+", f".target {arch}", ptx, count=1, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        options = ["-v", f"--gpu-name={arch}"]
        ptxas = get_ptxas(int(re.sub(r"\D", "", arch))).path
        command = [ptxas, *options, "-o", str(target), str(source)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        return target.read_bytes(), log


def registers_and_spills(cubin: bytes, ptx: str) -> tuple[int, int]:
    """Return the registers per thread of the only kernel in ``cubin``, and its spilled bytes."""
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", _dump(cubin, "-res-usage"))
    if stack == "0":
        return int(registers), 0
    # The stack also holds local arrays; only the log of ptxas tells the spills apart.
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    _, log = assembled(ptx, target)
    return int(registers), sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))


def instructions(cubin: bytes) -> Counter[str]:
    """Count the instructions by kind: ``LDG.128`` (loads of 128 bits per thread), ``HGMMA``."""
    return counted(_dump(cubin, "-sass"))


def counted(sass: str) -> Counter[str]:
    """Count the instructions in the output of cuobjdump, as ``instructions`` does."""
    return Counter(map(_kind, _INSTRUCTION.findall(sass)))


def vectors(counts: Counter[str]) -> str:
    """Return the bits per thread of global loads, then of stores: ``128 x 4, 32 x 1; 128 x 2``."""
    return "; ".join(
        ", ".join(f"{bits} x {count}" for bits, count in sorted(of.items(), reverse=True))
        for of in (widths(counts, "LDG", "LDGSTS"), widths(counts, "STG"))
    )


def _kind(opcode: str) -> str:
    """Return the name of an opcode without its suffixes; of a memory access with its width."""
    name, *suffixes = opcode.split(".")
    if name not in _MEMORY:
        return name
    return f"{name}.{next((_WIDTHS[s] for s in suffixes if s in _WIDTHS), 32)}"


def widths(counts: Counter[str], *names: str) -> dict[int, int]:
    """Return the number of memory accesses by these opcodes for each width in bits."""
    found = ((kind.partition("."), n) for kind, n in counts.items())
    total: Counter[int] = Counter()
    for (name, _, width), n in found:
        if name in names:
            total[int(width)] += n
    return dict(total)


_LAYOUT = re.compile(
    r"^(#mma\d*) = #ttg.nvidia_mma<\{versionMajor = (\d).*"
    r"warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[(\d+), (\d+)",
    re.MULTILINE,
)
_DOT = re.compile(r"(?:warp_group_dot|tt\.dot) .*-> tensor<(\d+)x(\d+)x\w+, (#mma\d*)>")


def mma_redundancy(ttgir: str) -> float:
    """Return how many times the tensor cores compute the same products; 1 is the minimum.

    Where a tile has fewer rows or columns than the warps of a thread block cover together, some
    warps repeat the products of others. The result is 1 where the TTGIR does not state the layout.
    """
    covered = {
        m[1]: (int(m[3]) * int(m[5]), int(m[4]) * int(m[6])) for m in _LAYOUT.finditer(ttgir)
    }
    largest = 1.0
    for m in _DOT.finditer(ttgir):
        rows, cols = covered.get(m[3], (1, 1))
        largest = max(largest, max(rows / int(m[1]), 1) * max(cols / int(m[2]), 1))
    return largest


def _inner_loops(ttgir: str) -> Iterator[list[str]]:
    """Yield the lines of each loop that contains no other loop."""
    open_loops: list[tuple[str, list[str]]] = []
    for line in ttgir.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if open_loops and line.startswith(open_loops[-1][0] + "}"):
            _, body = open_loops.pop()
            if not any("scf.for" in inner for inner in body):
                yield body
        for _, body in open_loops:
            body.append(line)
        if "scf.for" in line:
            open_loops.append((indent, []))


_TILE_LOAD = re.compile(r"tt\.load .*: tensor<\d+x\d+x!tt\.ptr<(\w+)>")


def unpipelined_loads(ttgir: str) -> list[str]:
    """Return the dtypes of tiles that inner loops with matrix products load without prefetch."""
    found = []
    for body in _inner_loops(ttgir):
        if any("warp_group_dot " in line or "tt.dot " in line for line in body):
            found += [m[1] for line in body for m in _TILE_LOAD.finditer(line)]
    return found
