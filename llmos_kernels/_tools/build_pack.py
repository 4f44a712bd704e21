"""Compile Triton kernels ahead of time into the pack, for GPUs that need not be present.

A launcher is called with CPU tensors while each kernel launch is recorded instead of executed; the
recorded launches are compiled. ``python -m llmos_kernels._tools.build_pack FOLDER 8.0 9.0`` writes
the pack for compute capabilities 8.0 and 9.0.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.compiler import ASTSource, CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from llmos_kernels._triton.runtime import kernel_pack, launch, settings
from llmos_kernels._triton.runtime.launch import OPTIONS, Kernel, parameters

#: The modules of ``_triton`` whose ``variants()`` go into the pack.
MODULES = (
    "attention.forward",
    "attention.backward",
    "attention.weights",
    "gemm.activation",
    "gemm.linear",
    "gemm.linear_backward",
    "int8.layer_norm",
    "int8.linear",
    "int8.quantize",
    "norm.embedding",
    "norm.layer_norm",
    "norm.layer_norm_backward",
    "padding",
)
#: Approximate seconds to compile a kernel on one core, for the estimate that a build prints first.
SECONDS_PER_KERNEL = 0.6


@dataclass(frozen=True)
class Launch:
    """A kernel with the types and constants of its arguments: the input of ``triton.compile``."""

    fn: Kernel = field(compare=False)
    name: str
    key: str  # The key of this variant in the pack.
    signature: tuple[tuple[str, str], ...]  # (parameter, type) in order.
    constants: tuple[tuple[str, Any], ...]  # (parameter, value).
    aligned: tuple[str, ...]  # Parameters whose value is divisible by 16.
    options: tuple[tuple[str, Any], ...]  # (option, value), such as num_warps.

    def __str__(self) -> str:
        """Return the name, the first dtype, capital constants, and ``-x`` for each absent x."""
        constants = dict(self.constants)
        shown = [f"{k}={v}" for k, v in constants.items() if k.isupper()]
        absent = [k for k, v in constants.items() if v is None]
        dtype = next((t[1:] for _, t in self.signature if t.startswith("*")), "")
        return " ".join([self.name, dtype, *shown, *(f"-{k}" for k in absent)])

    def compile(self, arch: str) -> CompiledKernel:
        """Compile for ``arch``, such as sm_90."""
        fn = self.fn
        index = {p.name: i for i, p in enumerate(fn.params)}
        attrs = {(index[name],): [["tt.divisibility", 16]] for name in self.aligned}
        constants = {(index[name],): value for name, value in self.constants}
        source = ASTSource(fn, dict(self.signature), constants, attrs)
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        return triton.compile(source, target=target, options=dict(self.options))


def launch_of(fn: Kernel, args: tuple, kwargs: dict) -> Launch:
    """Return what ``fn[grid](*args, **kwargs)`` launches; remove launch options from ``kwargs``."""
    options = {k: v for k in OPTIONS if (v := kwargs.pop(k, None)) is not None}
    values = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[str] = []
    tokens: list[str] = []
    for name, specialize in parameters(fn):
        value = values[name]
        constant, by_value, by_alignment = (bool(specialize & bit) for bit in (1, 2, 4))
        divisible = False
        if constant or value is None or (by_value and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            tokens.append(f"={value!r}" if constant else "-" if value is None else "1")
            continue
        if isinstance(value, torch.Tensor):
            kind = f"*{kernel_pack.DTYPES[value.dtype]}"
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{kernel_pack.DTYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        else:
            kind = "fp32"
        signature[name] = kind
        divisible &= by_alignment
        if divisible:
            aligned.append(name)
        tokens.append(kind + "!" * divisible)
    chosen = "".join(f";{k}={options[k]}" for k in OPTIONS if k in options)
    return Launch(
        fn,
        fn.name,
        ",".join(tokens) + chosen,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        tuple(options.items()),
    )


@contextlib.contextmanager
def planned_for(arch: str | None, gpu: tuple[str | None, str] | None = None) -> Iterator[None]:
    """Make launchers choose as on a GPU of ``arch``; with None, as without a GPU.

    ``gpu`` is the name and the architecture whose tuned settings are used, by default of any GPU of
    ``arch``.
    """
    if arch is None:
        yield
        return
    wgmma = mock.patch.object(launch, "has_wgmma", lambda device: arch in launch.WGMMA_ARCHS)
    with wgmma, mock.patch.object(settings, "planned", gpu or (None, arch)):
        yield


@contextlib.contextmanager
def recorded_launches(arch: str | None = None) -> Iterator[list[Launch]]:
    """Append every Triton launch in this context to the list instead of executing it.

    The launchers choose as ``planned_for(arch)``.
    """
    launches: list[Launch] = []

    def record(self: Kernel, grid: tuple[int, ...], args: tuple, kwargs: dict[str, Any]) -> None:
        launches.append(launch_of(self, args, dict(kwargs)))

    with mock.patch.object(Kernel, "launch", record), planned_for(arch):
        yield launches


def calls(modules: Sequence[str] = MODULES) -> Iterator[tuple[Callable, tuple]]:
    """Yield (launcher, arguments) of each call to record for the pack; none is to be executed."""
    for name in modules:
        yield from importlib.import_module(f"llmos_kernels._triton.{name}").variants()


def variants(arch: str, modules: Sequence[str] = MODULES) -> list[Launch]:
    """Return the distinct launches that the pack holds for ``arch``."""
    # The launch rules without tuning, and the tuned settings of each GPU that can run this code.
    gpus: list[tuple[str | None, str]] = [(None, "none")]
    for table in settings.tables():
        if table["arch"] == arch or {table["arch"][:4], arch[:4]} == {"sm_8"}:
            gpus += [(None, table["arch"]), (table["gpu"], table["arch"])]
    with recorded_launches() as launches:
        for gpu in dict.fromkeys(gpus):
            with planned_for(arch, gpu):
                for launcher, args in calls(modules):
                    launcher(*args)
    return list(dict.fromkeys(launches))


def parameter_sizes(ptx: str) -> list[int]:
    """Return the bytes of each parameter of the only kernel in ``ptx``, including hidden ones."""
    (listed,) = re.findall(r"\.visible \.entry \w+\((.*?)\)", ptx, re.DOTALL)
    found = re.findall(r"\.param (?:\.align \d+ )?\.[bfus](\d+)\b[^\[,]*(?:\[(\d+)\])?", listed)
    return [int(bits) // 8 * int(length or 1) for bits, length in found]


def compile_entry(launch: Launch, arch: str) -> tuple[dict[str, Any], bytes]:
    """Compile ``launch`` and return its entry in the index and its compressed cubin.

    Raises:
        ValueError: The compiled kernel needs a feature that the pack's launcher does not have.
    """
    kernel = launch.compile(arch)
    m = kernel.metadata
    for name, expected in (
        ("num_ctas", 1),
        ("global_scratch_size", 0),
        ("profile_scratch_size", 0),
        ("launch_cooperative_grid", False),
        ("launch_pdl", False),
    ):
        if getattr(m, name, expected) != expected:
            raise ValueError(f"{launch}: the pack cannot launch with {name}={getattr(m, name)}")
    cubin = kernel.asm["cubin"]
    data = zlib.compress(cubin, 9)
    descriptors = [
        (d["swizzle"], d["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[d["elem_type"]], d["block_size"])
        for d in getattr(m, "tensordesc_meta", None) or ()
    ]
    return {
        "key": launch.key,
        "symbol": m.name,
        "warps": m.num_warps,
        "shared": m.shared,
        "parameters": parameter_sizes(kernel.asm["ptx"]),
        "descriptors": descriptors,
        "length": len(data),
        "sha256": hashlib.sha256(cubin).hexdigest(),
    }, data


def write(folder: Path, arch: str, entries: list[tuple[str, dict[str, Any], bytes]]) -> int:
    """Write the index ``<arch>.json`` and the cubins ``<arch>.bin``; return the size of the latter.

    ``entries`` are (kernel name, entry, compressed cubin).
    """
    kernels: dict[str, list[dict]] = {}
    offset = 0
    with (folder / f"{arch}.bin").open("wb") as f:
        for name, entry, data in entries:
            kernels.setdefault(name, []).append(entry | {"offset": offset})
            offset += f.write(data)
    index = {
        "format": kernel_pack.FORMAT,
        "arch": arch,
        "triton": triton.__version__,
        "sources": kernel_pack.sources_sum(),
        "bytes": offset,
        "kernels": kernels,
    }
    index["sha256"] = kernel_pack.index_sum(index)
    (folder / f"{arch}.json").write_text(json.dumps(index, sort_keys=True) + "\n")
    return offset


def pack_archs(listed: list[str]) -> list[str]:
    """Return the architectures, such as sm_90, for entries like 9.0, 9.0a or 12.0+PTX.

    Code for 8.0 runs on every 8.x, so of these only the lowest is returned.

    Raises:
        ValueError: An entry has another form.
    """
    numbers = set()
    for entry in listed:
        match = re.fullmatch(r"(\d+)\.(\d)a?(?:\+PTX)?", entry)
        if not match:
            raise ValueError(f"expected GPUs like 8.0, 9.0a or 12.0+PTX, got {entry!r}")
        numbers.add(int(match[1] + match[2]))
    ampere = [n for n in numbers if 80 <= n < 90]
    numbers -= {n for n in ampere if n != min(ampere)}
    # Triton supports no architecture before sm_80.
    return [f"sm_{n}" for n in sorted(numbers) if n >= 80]


#: The arguments of ``compile_entry`` for the worker processes, which inherit them by fork.
_JOBS: list[tuple[Launch, str]] = []


def _compile_job(i: int) -> tuple[dict[str, Any], bytes]:
    """Compile the job of that index, in a worker process."""
    return compile_entry(*_JOBS[i])


def build(folder: Path, wanted: dict[str, list[Launch]], jobs: int = 1) -> None:
    """Compile the wanted launches of each architecture and write the pack over an older one."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("sm_*"):
        old.unlink()
    # Line information would put paths of this machine into the cubins.
    with mock.patch.dict(os.environ, TRITON_DISABLE_LINE_INFO="1"):
        for arch, launches in wanted.items():
            _JOBS[:] = [(launch, arch) for launch in launches]
            with multiprocessing.get_context("fork").Pool(jobs) as pool:
                results = pool.imap(_compile_job, range(len(launches)), chunksize=4)
                compiled = list(_with_progress(results, arch))
            entries = [(k.name, *entry) for k, entry in zip(launches, compiled, strict=True)]
            size = write(folder, arch, entries)
            print(f"pack: {len(entries)} kernels for {arch}, {size / 2**20:.1f} MiB", flush=True)


def _with_progress(
    results: Iterable[tuple[dict[str, Any], bytes]], arch: str
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield ``results`` and print a line at every tenth of them."""
    total, start = len(_JOBS), time.perf_counter()
    for count, result in enumerate(results, 1):
        if count * 10 // total > (count - 1) * 10 // total:
            left = (time.perf_counter() - start) * (total - count) / count
            progress = f"pack: {count} of {total} kernels for {arch}"
            print(f"{progress}, {left / 60:.1f} minutes to go", flush=True)
        yield result


def main() -> int:
    """Build the pack that the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llmos_kernels._tools.build_pack")
    parser.add_argument("folder", type=Path)
    parser.add_argument("gpus", nargs="+", help="as in TORCH_CUDA_ARCH_LIST: 8.0 9.0 12.0+PTX")
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=MODULES, metavar="MODULE")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    try:
        wanted = {arch: variants(arch, args.modules) for arch in pack_archs(args.gpus)}
    except ValueError as e:
        parser.error(str(e))
    total = sum(map(len, wanted.values()))
    minutes = total * SECONDS_PER_KERNEL / args.jobs / 60
    print(f"pack: {total} kernels for {', '.join(wanted)}, about {minutes:.0f} minutes", flush=True)
    build(args.folder, wanted, args.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
