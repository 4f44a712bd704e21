"""What the compiler makes of every Triton kernel, for a GPU that need not be there.

A launcher is run on CPU tensors with each launch recorded instead of done; what it would have
launched is compiled ahead of time. So the table shows the configurations that users get.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One kernel in one configuration: what triton.compile needs."""

    fn: JITFunction = field(compare=False)
    name: str
    signature: tuple
    constants: tuple
    aligned: tuple
    options: tuple

    def __str__(self) -> str:
        constants = dict(self.constants)
        shown = [f"{k}={v}" for k, v in constants.items() if k.isupper()]
        absent = [k for k, v in constants.items() if v is None]
        dtype = next((t[1:] for _, t in self.signature if t.startswith("*")), "")
        return " ".join([self.name, dtype, *shown, *(f"-{k}" for k in absent)])

    def compile(self, arch: str):
        """The compiled kernel for ``arch``, as sm_90."""
        fn = self.fn
        index = {p.name: i for i, p in enumerate(fn.params)}
        attrs = {(index[name],): [["tt.divisibility", 16]] for name in self.aligned}
        constants = {(index[name],): value for name, value in self.constants}
        source = ASTSource(fn, dict(self.signature), constants, attrs)
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        return triton.compile(source, target=target, options=dict(self.options))


def _launch(fn: JITFunction, args: tuple, kwargs: dict) -> Launch:
    options = {k: kwargs.pop(k) for k in _OPTIONS if k in kwargs}
    values = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    signature, constants, aligned = {}, {}, []
    for parameter in fn.params:
        name, value = parameter.name, values[parameter.name]
        special = not parameter.do_not_specialize
        one = special and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and special:
                aligned.append(name)
        else:
            signature[name] = "fp32"
    return Launch(
        fn,
        fn.fn.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        tuple(options.items()),
    )


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Every Triton launch inside is appended to the list instead of done."""
    launches: list[Launch] = []

    def record(self, *args, grid, warmup, **kwargs):
        launches.append(_launch(self, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def launches(dtypes=None, widths=None, names=None) -> list[Launch]:
    """The distinct launches of every case, forward and backward, and of "int8"."""
    from llmos_kernels._registry import DEFINED
    from llmos_kernels.cases import int8
    from llmos_kernels.testing import CASES, DTYPES, raw_calls

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
            with recorded_launches() as some:
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


def resources(launch: Launch, arch: str) -> Resources:
    """Compile ``launch`` for ``arch`` and read what ptxas made of it."""
    kernel = launch.compile(arch)
    ptx = kernel.asm["ptx"]
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    ptxas = get_ptxas(int(arch.removeprefix("sm_"))).path
    log = subprocess.run(
        [ptxas, "-v", f"--gpu-name={target}", "-o", os.devnull, "-"],
        input=ptx,
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    (registers,) = re.findall(r"Used (\d+) registers", log)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return Resources(
        launch,
        arch,
        int(registers),
        spills,
        kernel.metadata.shared,
        "wgmma" in ptx,
        overflows(kernel.asm["ttir"]),
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


def table(arch: str, dtype: torch.dtype | None = None) -> Iterator[Resources]:
    """The resources of every launch on ``arch``, one after the other."""
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {arch!r}")
    return (resources(launch, arch) for launch in launches(dtypes=dtype and (dtype,)))
