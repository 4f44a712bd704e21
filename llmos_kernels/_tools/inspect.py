"""Report what the compiler makes of every Triton kernel, for a GPU that need not be present.

The kernels are compiled in the configurations that users get, as ``build_pack`` records them.
"""

import fnmatch
import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from triton.compiler import CompiledKernel

from llmos_kernels._core.registry import DEFINED
from llmos_kernels._tools import machine_code
from llmos_kernels._tools.build_pack import Launch, recorded_launches
from llmos_kernels.testing import CASES, DTYPES, raw_calls
from llmos_kernels.testing.cases import int8

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def launches(
    dtypes: Sequence[torch.dtype] | None = None,
    widths: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    arch: str | None = None,
) -> list[Launch]:
    """Return the distinct launches of the cases, forward and backward, and of int8.

    Args:
        dtypes: Dtypes of the inputs; float32, bfloat16 and float16 by default.
        widths: Last dimensions of the shapes; those of each case by default.
        names: Names of cases, or "int8"; all by default.
        arch: The architecture for which the launch settings are chosen; None chooses as without a
            GPU.
    """

    def calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
        for case in (c for c in CASES if names is None or c.name in names):
            for shape in {(*case.shapes[-1][:-1], w) for w in widths or case.compile_widths}:
                args = case.make(shape, dtype=dtype, requires_grad=True)
                yield from ((op.name(), args) for op, args in raw_calls(case, args))
        if names is None or "int8" in names:
            yield from int8.raw_calls(dtype)

    found: dict[Launch, None] = {}
    for dtype in dtypes or DTYPES:
        for op, args in calls(dtype):
            if DEFINED[op].triton is None:
                continue
            with recorded_launches(arch) as recorded:
                DEFINED[op].launch(*args)
            found.update(dict.fromkeys(recorded))
    return list(found)


@dataclass
class Resources:
    """The registers, memory and instructions of one compiled kernel."""

    launch: Launch
    arch: str
    registers: int  # Per thread.
    spills: int  # Bytes of register spills, stores and loads together.
    shared: int  # Bytes of shared memory.
    wgmma: bool  # Whether the PTX has warp-group matrix instructions.
    overflows: list[str]  # See the function ``overflows``.
    cubin: bytes
    mma_redundancy: float  # How many times tensor cores compute the same products; 1 is none twice.
    unpipelined_loads: list[str]  # Dtypes of the tiles that loops load only when they need them.

    @functools.cached_property
    def instructions(self) -> Counter[str]:
        """The number of instructions of each kind, see ``machine_code.instructions``."""
        return machine_code.instructions(self.cubin)

    @property
    def matrix(self) -> str:
        """The name of the widest tensor core instruction in the kernel, or "-"."""
        return next((kind for kind in machine_code.MATRIX if self.instructions[kind]), "-")

    @property
    def vectors(self) -> str:
        """Bits per thread of global loads, then of stores: ``128 x 4, 32 x 1; 128 x 2``."""
        return machine_code.vectors(self.instructions)


def resources(launch: Launch, arch: str) -> Resources:
    """Compile ``launch`` for ``arch`` and return its resources."""
    return _read(launch, arch, launch.compile(arch))


def resources_of_ampere(launch: Launch, archs: Sequence[str]) -> list[Resources]:
    """Return the resources of ``launch`` for each of ``archs``, all sm_8x, compiled once by Triton.

    Triton generates the same PTX for all sm_8x, so only ptxas runs for each of them.
    """
    kernel = launch.compile("sm_80")
    return [
        _read(launch, arch, kernel, machine_code.assembled(kernel.asm["ptx"], arch)[0])
        for arch in archs
    ]


def _read(
    launch: Launch, arch: str, kernel: CompiledKernel, cubin: bytes | None = None
) -> Resources:
    """Return the resources of a compiled kernel; ``cubin`` replaces the one that Triton made."""
    cubin = kernel.asm["cubin"] if cubin is None else cubin
    registers, spills = machine_code.registers_and_spills(cubin, kernel.asm["ptx"])
    return Resources(
        launch,
        arch,
        registers,
        spills,
        kernel.metadata.shared,
        "wgmma" in kernel.asm["ptx"],
        overflows(kernel.asm["ttir"]),
        cubin,
        machine_code.mma_redundancy(kernel.asm["ttgir"]),
        machine_code.unpipelined_loads(kernel.asm["ttgir"]),
    )


_ASSIGN = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = ([\w.]+)\s?(.*)$")
#: Operations whose results stay small however large the tensor is: a product with them cannot
#: overflow.
_SMALL = {
    "tt.make_range",
    "arith.constant",
    "tt.expand_dims",
    "tt.broadcast",
    "tt.splat",
    "arith.extsi",
}


def overflows(ttir: str) -> list[str]:
    """Return the pointer offsets that are 32-bit products of run-time values.

    Such an offset is wrong in a tensor of more than 2^31 elements.
    """
    defined = {}
    for line in ttir.splitlines():
        if match := _ASSIGN.match(line):
            defined[match[1]] = (match[2], re.findall(r"%[\w#]+", match[3].split(" : ")[0]), line)

    def small(name: str) -> bool:
        op, operands, _ = defined.get(name, ("argument", [], ""))
        return op in _SMALL and all(small(o) for o in operands)

    def products(name: str) -> Iterator[str]:
        op, operands, line = defined.get(name, ("argument", [], ""))
        is_32_bit = "i32" in line.rsplit(" : ", 1)[-1].split("loc")[0]
        if op == "arith.muli" and is_32_bit and not any(small(o) for o in operands):
            yield line.strip()
        for operand in operands:
            yield from products(operand)

    found: list[str] = []
    for op, operands, _ in list(defined.values()):
        if op == "tt.addptr":
            found += products(operands[1])
    return found


def table(arch: str, dtype: torch.dtype | None = None, kernels: str = "*") -> Iterator[Resources]:
    """Return an iterator over the resources of every launch on ``arch``, compiled one by one.

    Args:
        arch: One of ``ARCHS``.
        dtype: The dtype of the inputs; all dtypes by default.
        kernels: A pattern of kernel names, such as ``norm.layer_norm:*``.

    Raises:
        ValueError: ``arch`` is not one of ``ARCHS``.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {arch!r}")
    chosen = launches(None if dtype is None else (dtype,), arch=arch)
    return (resources(k, arch) for k in chosen if fnmatch.fnmatch(k.name, kernels))


def print_table(arch: str, dtype: torch.dtype | None = None, kernels: str = "*") -> None:
    """Print a line of ``table`` for each launch. Takes and raises what ``table`` does."""
    rows = table(arch, dtype, kernels)
    print(f"kernels on {arch}; global loads; global stores: bits per thread x instructions")
    print("matrix: tensor core instruction, x 2 if products repeat; waits: unpipelined loads")
    print("regs spills  shared matrix    waits  kernel; loads; stores")
    for r in rows:
        matrix = r.matrix + f" x {r.mma_redundancy:g}" * (r.mma_redundancy > 1)
        numbers = (
            f"{r.registers:4} {r.spills:6} {r.shared:7} {matrix:9} {len(r.unpipelined_loads):5}"
        )
        print(f"{numbers}  {r.launch}; {r.vectors}", flush=True)
