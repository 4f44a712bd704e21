"""What the compiler makes of every Triton kernel, for a GPU that need not be there.

The table shows the configurations that users get: see ``_compile``.
"""

import fnmatch
import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llmos_kernels._tools import machine_code
from llmos_kernels._tools.build_pack import Launch, recorded_launches

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def launches(dtypes=None, widths=None, names=None, arch=None) -> list[Launch]:
    """The distinct launches of every case, forward and backward, and of "int8"; as on ``arch``."""
    from llmos_kernels._core.registry import DEFINED
    from llmos_kernels.testing import CASES, DTYPES, raw_calls
    from llmos_kernels.testing.cases import int8

    def calls(dtype):
        for case in (c for c in CASES if names is None or c.name in names):
            for shape in {(*case.shapes[-1][:-1], width) for width in widths or case.widths}:
                args = case.make(shape, dtype=dtype, requires_grad=True)
                yield from ((op.name(), args) for op, args in raw_calls(case, args))
        if names is None or "int8" in names:
            yield from int8.raw_calls(dtype)

    found: dict[Launch, None] = {}
    for dtype in dtypes or DTYPES:
        for op, args in calls(dtype):
            if DEFINED[op].triton is None:
                continue
            with recorded_launches(arch) as some:
                DEFINED[op].launch(*args)
            found.update(dict.fromkeys(some))
    return list(found)


@dataclass
class Resources:
    """What one compiled kernel takes."""

    launch: Launch
    arch: str
    registers: int
    spills: int  # Bytes stored and loaded.
    shared: int  # Bytes.
    wgmma: bool
    overflows: list[str]
    cubin: bytes
    repeated: float  # How often tensor cores do the same work.
    waited_for: list[str]  # Dtypes of tiles that are not loaded ahead.

    @functools.cached_property
    def instructions(self) -> Counter[str]:
        """As ``_machine_code`` counts them."""
        return machine_code.instructions(self.cubin)

    @property
    def matrix(self) -> str:
        """The widest instruction of tensor cores that it has, or none."""
        return next((kind for kind in machine_code.MATRIX if self.instructions[kind]), "-")

    @property
    def vectors(self) -> str:
        """Widths in bits of loads from and stores to global memory: ``128 x 4, 32 x 1; 128 x 2``."""
        kinds = ("LDG", "LDGSTS"), ("STG",)
        widths = (machine_code.widths(self.instructions, *kind) for kind in kinds)
        return "; ".join(
            ", ".join(f"{w} x {w_n}" for w, w_n in sorted(of.items(), reverse=True))
            for of in widths
        )


def resources(launch: Launch, arch: str) -> Resources:
    """Compile ``launch`` for ``arch`` and read what ptxas made of it."""
    return _read(launch, arch, launch.compile(arch))


def resources_of_ampere(launch: Launch, archs: Sequence[str]) -> list[Resources]:
    """What ``resources`` gives for each of ``archs``, sm_8x, with one compilation: Triton's PTX is the same
    for all of them, and ptxas alone is asked again."""
    kernel = launch.compile("sm_80")
    return [
        _read(launch, arch, kernel, machine_code.assembled(kernel.asm["ptx"], arch)[0])
        for arch in archs
    ]


def _read(launch: Launch, arch: str, kernel, cubin: bytes | None = None) -> Resources:
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
        machine_code.repeated(kernel.asm["ttgir"]),
        machine_code.waited_for(kernel.asm["ttgir"]),
    )


_ASSIGN = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = ([\w.]+)\s?(.*)$")
#: What an operand of a 32-bit product may come from: it is small whatever the tensor.
_SMALL = {
    "tt.make_range",
    "arith.constant",
    "tt.expand_dims",
    "tt.broadcast",
    "tt.splat",
    "arith.extsi",
}


def overflows(ttir: str) -> list[str]:
    """Pointer offsets that are 32-bit products of run-time values: wrong past 2^31 elements."""
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
    """The resources of every launch on ``arch`` of the ``kernels``, as layer_norm:*, one after the other."""
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {arch!r}")
    chosen = launches(dtype and (dtype,), arch=arch)
    return (resources(k, arch) for k in chosen if fnmatch.fnmatch(k.name, kernels))
