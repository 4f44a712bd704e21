"""What ptxas and Triton have made of a kernel: instructions by kind and width, work that is done twice,
loads that are waited for.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
#: Instructions that move memory, and the suffixes of their widths in bits; without one 32.
_MEMORY = ("LDG", "STG", "LDGSTS", "LDL", "STL", "LDS", "STS")
_WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
#: Tensor cores: of whole warp groups, of a warp, and of Blackwell.
MATRIX = ("HGMMA", "IGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCIMMA")


def _dump(cubin: bytes, option: str) -> str:
    """What cuobjdump says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def assembled(ptx: str, arch: str) -> tuple[bytes, str]:
    """The cubin that ptxas makes of PTX for ``arch``, of the family that it is for, and what it says of it.

    Triton 3.7 adds --regAllocOptLevel=2 against a fault of ptxas 13; with it some kernels for sm_100 and
    sm_120 spill 8 to 24 bytes, which is not asked here.
    """
    ptx = re.sub(r"^\.target \w+", f".target {arch}", ptx, count=1, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        options = ["-v", f"--gpu-name={arch}"]
        ptxas = get_ptxas(int(re.sub(r"\D", "", arch))).path
        command = [ptxas, *options, "-o", str(made), str(source)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        return made.read_bytes(), log


def registers_and_spills(cubin: bytes, ptx: str) -> tuple[int, int]:
    """The registers of a thread of the one kernel in ``cubin``, and the bytes that it spills."""
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", _dump(cubin, "-res-usage"))
    if stack == "0":
        return int(registers), 0
    # A stack holds other things, too: ptxas knows.
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    _, log = assembled(ptx, target)
    return int(registers), sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))


def instructions(cubin: bytes) -> Counter[str]:
    """How many of each the code has: ``LDG.128`` (loads of 128 bits a thread), ``HGMMA``, ``BAR`` ..."""
    return Counter(map(_kind, _INSTRUCTION.findall(_dump(cubin, "-sass"))))


def _kind(opcode: str) -> str:
    name, *suffixes = opcode.split(".")
    if name not in _MEMORY:
        return name
    return f"{name}.{next((_WIDTHS[s] for s in suffixes if s in _WIDTHS), 32)}"


def widths(counts: Counter[str], *names: str) -> dict[int, int]:
    """The widths in bits of the accesses of these kinds, and how many there are of each."""
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
_PRODUCT = re.compile(r"(?:warp_group_dot|tt\.dot) .*-> tensor<(\d+)x(\d+)x\w+, (#mma\d*)>")


def repeated(ttgir: str) -> float:
    """How often the tensor cores do the same: warps without rows or columns of their own repeat those of
    others, and what is made of them. 1 where none does, and where Triton does not say."""
    tiles = {m[1]: (int(m[3]) * int(m[5]), int(m[4]) * int(m[6])) for m in _LAYOUT.finditer(ttgir)}
    most = 1.0
    for m in _PRODUCT.finditer(ttgir):
        rows, cols = tiles.get(m[3], (1, 1))
        most = max(most, max(rows / int(m[1]), 1) * max(cols / int(m[2]), 1))
    return most


def _bodies(ttgir: str) -> Iterator[list[str]]:
    """The lines of each loop that has no other in it."""
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


def waited_for(ttgir: str) -> list[str]:
    """The dtypes of tiles that a loop with products loads when it needs them, not steps ahead."""
    found = []
    for body in _bodies(ttgir):
        if any("warp_group_dot " in line or "tt.dot " in line for line in body):
            found += [m[1] for line in body for m in _TILE_LOAD.finditer(line)]
    return found
