"""Report which kernels run here, and why others do not: ``python -m llmos_kernels env``."""

import collections
import datetime
import importlib.metadata
import itertools
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch

import llmos_kernels
from llmos_kernels._core.registry import _FORCED, DEFINED, HAS_TRITON
from llmos_kernels._tools import checksums
from llmos_kernels._triton.runtime import kernel_pack
from llmos_kernels.ops._cpu_facts import model_name
from llmos_kernels.ops._product_measurements import DIRECTIONS, LAYER, Grid
from llmos_kernels.ops._product_policy import (
    NO_LIMIT,
    OURS,
    PROVIDERS,
    TORCH,
    ProductRule,
    table,
)

#: The dispatch keys that are reported, one for each kind of device.
KEYS = ("CPU", "CUDA")


def owner(op: str, key: str) -> str:
    """Return the source file of the kernel of ``op`` on dispatch key ``key``, or "reference".

    An op of the CUDA part has two: its own, and that of the launcher to which it hands more rows.
    """
    if _FORCED == "reference":
        return "reference"
    for line in torch._C._dispatch_dump(op).splitlines():
        found, _, where = line.partition(": registered at ")
        if found == key and "(inactive)" not in line:
            triton = DEFINED[op].triton
            if triton and not HAS_TRITON:
                break
            launcher = f"_triton/{(triton or '').partition(':')[0].replace('.', '/')}.py"
            if triton and "_core/registry.py" in where:
                return launcher
            source = re.sub(r"^.*?csrc/", "csrc/", where.partition(" ::")[0].partition(":")[0])
            hands_over = hasattr(torch.ops.llmos, f"{op.partition('::')[2]}_triton")
            return f"{source}, else {launcher}" if hands_over and key == "CUDA" else source
    return "reference"


def why_reference(op: str, key: str) -> str:
    """Return why ``op`` has no kernel on dispatch key ``key``; empty if none is expected."""
    if _FORCED == "reference":
        return "LLMOS_BACKEND=reference"
    if key == "CPU":
        return "" if _extension() else "the C++ extension is not built"
    if not torch.backends.cuda.is_built():
        return "this torch has no CUDA"
    if DEFINED[op].triton:
        return "Triton is not installed"
    return "the CUDA part is not built"


def _extension() -> ModuleType | None:
    """Return the C++ extension if it is loaded."""
    return sys.modules.get("llmos_kernels._C")


def _version(package: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda_part(device: int, arch: str) -> str:
    """Return a line on what the CUDA C++ kernels were built for, seen from a device."""
    try:
        code = torch.ops.llmos.built_for(torch.empty(0, device=f"cuda:{device}")).item()
    except RuntimeError:  # No kernel image is available for execution on the device.
        return f"CUDA part: not built for {arch}; its ops raise"
    if not code:
        return "CUDA part: not built"
    layer = "whole layers: attention by torch, with a mask by Triton's launcher"
    return f"CUDA part runs its sm_{code} code; {layer}"


def triton_kernels(arch: str) -> str:
    """Return a line on where a GPU of ``arch`` gets its Triton kernels from."""
    packed = kernel_pack.covering(arch)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not HAS_TRITON:
        return "Triton kernels: none, Triton is not installed; the slow reference answers"
    if kernel_pack.MODE == "require" or kernel_pack.used_on(arch):
        try:
            kernel_pack.opened(arch)
        except kernel_pack.PackError as e:
            if kernel_pack.MODE == "require":
                return f"Triton kernels: none, LLMOS_PACK=require and {e}"
        else:
            required = kernel_pack.MODE == "require"
            others = "others raise" if required else "others compiled when first used"
            return f"Triton kernels: from the pack, for {packed}; {others}"
    why = "not from the pack"
    if kernel_pack.archs() and packed is None:
        why = f"the pack has none for {arch}"
    if compiler is None:
        return f"Triton kernels: {why}, and there is no C compiler; the slow reference answers"
    return f"Triton kernels: {why}, compiled when first used, with {Path(compiler).name}"


def _gpus() -> Iterator[str]:
    """Yield three lines for each GPU, or one on why there is none."""
    if not torch.cuda.is_available():
        yield "none" if torch.backends.cuda.is_built() else "none that this CPU-only torch can use"
        return
    for i in range(torch.cuda.device_count()):
        p, arch = torch.cuda.get_device_properties(i), kernel_pack.arch_of(i)
        yield f"{p.name}, {arch}, {p.total_memory / 2**30:.0f} GiB"
        yield _cuda_part(i, arch)
        yield triton_kernels(arch)


def _sizes(rule: ProductRule) -> str:
    """Return the range of sizes of ``rule``, for people."""

    def limits(low: int, high: int, shown: Callable[[int], str], unit: str) -> list[str]:
        if (low, high) == (0, NO_LIMIT):
            return []
        return [f"{shown(low)} {'or more' if high == NO_LIMIT else f'to {shown(high)}'} {unit}"]

    def power(n: int) -> str:
        return f"2^{n.bit_length() - 1}" if n.bit_count() == 1 else str(n)

    shown = [
        *limits(rule.rows_from, rule.rows_below, str, "rows"),
        *limits(rule.macs_from, rule.macs_below, power, "MACs"),
        *limits(rule.depth_from, rule.depth_below, str, "in_features"),
        *limits(rule.width_from, rule.width_below, str, "out_features"),
    ]
    return ", ".join(shown) or "any size"


def _measured(direction: str, grid: Grid) -> str:
    """Return which library was faster at how many sizes, and the file that says so."""
    theirs = (
        "with gradients torch's own"
        if direction == LAYER
        else f"torch's {PROVIDERS[grid.torch_library]}"
    )
    counts = collections.Counter(point.faster for point in grid.points)
    days = (datetime.date.today() - grid.date).days
    age = f"{days} days old" if days >= 0 else "of the future"
    return (
        f"{theirs} faster at {counts[TORCH]} of {len(grid.points)} sizes, ours at {counts[OURS]};"
        f" {grid.path.name} of {grid.date}, {age}, {grid.commit}"
    )


def _by_rules(direction: str, rules: Sequence[ProductRule]) -> str:
    """Return where torch's libraries compute a product, by the rules for unmeasured machines."""
    if direction == LAYER:
        ours = "; ".join(map(_sizes, rules))
        but = f", but for {ours}" if ours else ""
        said = "ours: any size" if ours == "any size" else f"torch's own{but}"
    else:
        theirs = [
            f"torch's {PROVIDERS[rule.provider]}: {_sizes(rule)}"
            for rule in rules
            if rule.provider != OURS
        ]
        said = "; ".join(theirs) or "ours: any size"
    return f"{said} (conservative rule)"


def products() -> Iterator[str]:
    """Yield a line for each matrix product: who computes it, by which measurement or rule."""
    devices = [("CPU", torch.device("cpu"))]
    devices += [("CUDA", torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for (key, device), dtype in itertools.product(devices, dtypes):
        short = str(dtype).removeprefix("torch.")
        measured, rules = table(dtype, device)
        for direction in DIRECTIONS:
            name = "nn.Linear" if direction == LAYER else f"linear {direction}"
            if direction in measured:
                said = _measured(direction, measured[direction])
            else:
                said = _by_rules(direction, rules[direction])
            yield f"{f'{short} {name}':32} {key:6} {said}"


def describe() -> Iterator[str]:
    """Yield the lines that ``env`` prints; the last one is the verdict."""
    yield f"llmos_kernels {llmos_kernels.__version__}"
    yield f"python        {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"torch         {torch.__version__}"
    yield f"triton        {_version('triton')}"
    extension = _extension()
    cpu = model_name() or platform.processor() or platform.machine()
    yield f"cpu           {cpu}, {torch.get_num_threads()} threads"
    if extension:
        limited = " (LLMOS_CPU_LEVEL)" if os.environ.get("LLMOS_CPU_LEVEL") else ""
        levels = ", ".join(extension.cpu_levels())
        yield f"cpu ISA       {extension.cpu_level()}{limited} of {levels}"
        build = extension.build
        archs = build["cuda_archs"] or "none: no nvcc, or no GPU to build for"
        yield f"build         {build['compiler']}, torch {build['torch']}, CUDA archs {archs}"
        yield f"              {checksums.commit()}"
    else:
        yield "build         pure Python: no C++ compiler or no torch at build time"
    yield f"pack          {kernel_pack.state()}"
    for line in _gpus():
        yield f"gpu           {line}"
    yield ""
    yield f"{'op':32} {'device':6} answered by"
    slow = set()
    for op in sorted(DEFINED):
        for key in KEYS:
            file, why = owner(op, key), ""
            if file == "reference":
                why = why_reference(op, key)
                if why and (key == "CPU" or torch.cuda.is_available()):
                    slow.add(f"{key}: {why}")
            yield f"{op:32} {key:6} {file}{f' ({why})' if why else ''}"
    yield from products()
    yield ""
    verdict = "every op has a kernel for every device of this machine"
    yield f"verdict: {'the reference answers on ' + '; '.join(sorted(slow)) if slow else verdict}"
