"""Triton kernels compiled ahead of time, for GPUs that need not be there.

A launcher is run on CPU tensors with each launch recorded instead of done; what it would have
launched is what is compiled. ``python -m llmos_kernels._tools.build_pack FOLDER 8.0 9.0`` makes the pack.
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
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from llmos_kernels._triton.runtime import kernel_pack, launch, settings
from llmos_kernels._triton.runtime.launch import OPTIONS, Kernel, parameters

#: The modules of ``_triton`` whose ``variants`` are packed.
MODULES = (
    "attention.forward", "attention.backward", "attention.weights", "gemm.activation", "gemm.linear",
    "gemm.linear_backward", "int8.layer_norm", "int8.linear", "norm.embedding", "norm.layer_norm",
    "norm.layer_norm_backward",
)  # fmt: skip
#: About what one core takes for a kernel, in seconds: what a build says before it starts.
SECONDS_PER_KERNEL = 0.6


@dataclass(frozen=True)
class Launch:
    """One kernel in one configuration: what triton.compile needs."""

    fn: Kernel = field(compare=False)
    name: str
    key: str  # As the pack looks it up.
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


def launch_of(fn: Kernel, args: tuple, kwargs: dict) -> Launch:
    """What ``fn[grid](*args, **kwargs)`` launches."""
    options = {k: v for k in OPTIONS if (v := kwargs.pop(k, None)) is not None}
    values = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    signature, constants, aligned, tokens = {}, {}, [], []
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
    """Launchers decide as on ``arch``, with the settings of ``gpu``, its name and architecture, by
    default any of ``arch``; None: as where there is no GPU."""
    if arch is None:
        yield
        return
    wgmma = mock.patch.object(launch, "has_wgmma", lambda device: arch in launch.WGMMA_ARCHS)
    with wgmma, mock.patch.object(settings, "planned", gpu or (None, arch)):
        yield


@contextlib.contextmanager
def recorded_launches(arch: str | None = None) -> Iterator[list[Launch]]:
    """Every Triton launch inside is appended to the list instead of done; as planned for ``arch``."""
    launches: list[Launch] = []

    def record(self, grid, args, kwargs):
        launches.append(launch_of(self, args, dict(kwargs)))

    with mock.patch.object(Kernel, "launch", record), planned_for(arch):
        yield launches


def calls(modules: Sequence[str] = MODULES) -> Iterator[tuple[Callable, tuple]]:
    """The calls of launchers whose kernels are packed, not to be run."""
    for name in modules:
        yield from importlib.import_module(f"llmos_kernels._triton.{name}").variants()


def variants(arch: str, modules: Sequence[str] = MODULES) -> list[Launch]:
    """The distinct launches that the pack holds for ``arch``."""
    # By the rules, and as each GPU that will run this code was tuned.
    gpus: list[tuple] = [(None, "none")]
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
    """The bytes of each parameter of the one kernel in ``ptx``, the hidden ones too."""
    (listed,) = re.findall(r"\.visible \.entry \w+\((.*?)\)", ptx, re.DOTALL)
    found = re.findall(r"\.param (?:\.align \d+ )?\.[bfus](\d+)\b[^\[,]*(?:\[(\d+)\])?", listed)
    return [int(bits) // 8 * int(length or 1) for bits, length in found]


def packed(launch: Launch, arch: str) -> tuple[dict, bytes]:
    """What the pack holds of a launch: its entry, and its cubin, compressed."""
    made = launch.compile(arch)
    m = made.metadata
    for name, expected in (
        ("num_ctas", 1), ("global_scratch_size", 0), ("profile_scratch_size", 0),
        ("launch_cooperative_grid", False), ("launch_pdl", False),
    ):  # fmt: skip
        if getattr(m, name, expected) != expected:
            raise ValueError(f"{launch}: the pack cannot launch with {name}={getattr(m, name)}")
    cubin = made.asm["cubin"]
    data = zlib.compress(cubin, 9)
    maps = [
        (d["swizzle"], d["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[d["elem_type"]], d["block_size"])
        for d in getattr(m, "tensordesc_meta", None) or ()
    ]
    return {
        "key": launch.key, "symbol": m.name, "warps": m.num_warps, "shared": m.shared,
        "parameters": parameter_sizes(made.asm["ptx"]), "descriptors": maps,
        "length": len(data), "sha256": hashlib.sha256(cubin).hexdigest(),
    }, data  # fmt: skip


def write(folder: Path, arch: str, entries: list[tuple[str, dict, bytes]]) -> int:
    """``sm_90.json`` and ``sm_90.bin`` in ``folder``; the bytes of the latter."""
    kernels: dict[str, list[dict]] = {}
    offset = 0
    with (folder / f"{arch}.bin").open("wb") as f:
        for name, entry, data in entries:
            kernels.setdefault(name, []).append(entry | {"offset": offset})
            offset += f.write(data)
    index = {
        "format": kernel_pack.FORMAT, "arch": arch, "triton": triton.__version__,
        "sources": kernel_pack.sources_sum(), "bytes": offset, "kernels": kernels,
    }  # fmt: skip
    index["sha256"] = kernel_pack.index_sum(index)
    (folder / f"{arch}.json").write_text(json.dumps(index, sort_keys=True) + "\n")
    return offset


def pack_archs(listed: list[str]) -> list[str]:
    """The architectures to compile for, as sm_90, of entries as 9.0, 9.0a or 12.0+PTX: the code of
    8.0 serves all of 8.x."""
    numbers = set()
    for entry in listed:
        match = re.fullmatch(r"(\d+)\.(\d)a?(?:\+PTX)?", entry)
        if not match:
            raise ValueError(f"expected GPUs like 8.0, 9.0a or 12.0+PTX, got {entry!r}")
        numbers.add(int(match[1] + match[2]))
    ampere = [n for n in numbers if 80 <= n < 90]
    numbers -= {n for n in ampere if n != min(ampere)}
    # Triton compiles for none before.
    return [f"sm_{n}" for n in sorted(numbers) if n >= 80]


def _work(i: int) -> tuple[dict, bytes]:
    return packed(*_JOBS[i])


_JOBS: list[tuple[Launch, str]] = []


def build(folder: Path, wanted: dict[str, list[Launch]], jobs: int = 1) -> None:
    """The pack of the wanted launches of each architecture in ``folder``, in place of what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("sm_*"):
        old.unlink()
    # Debug information has the paths of this machine.
    with mock.patch.dict(os.environ, TRITON_DISABLE_LINE_INFO="1"):
        for arch, launches in wanted.items():
            _JOBS[:] = [(launch, arch) for launch in launches]
            with multiprocessing.get_context("fork").Pool(jobs) as pool:
                done = list(_shown(pool.imap(_work, range(len(launches)), chunksize=4), arch))
            entries = [(k.name, *made) for k, made in zip(launches, done, strict=True)]
            size = write(folder, arch, entries)
            print(f"pack: {len(entries)} kernels for {arch}, {size / 2**20:.1f} MiB", flush=True)


def _shown(made: Iterable[tuple[dict, bytes]], arch: str) -> Iterator[tuple[dict, bytes]]:
    """``made``, with a line of progress at every tenth of it."""
    total, start = len(_JOBS), time.perf_counter()
    for count, one in enumerate(made, 1):
        if count * 10 // total > (count - 1) * 10 // total:
            taken = time.perf_counter() - start
            left = taken * (total - count) / count
            print(f"pack: {count} of {total} kernels for {arch}, {left / 60:.1f} minutes to go", flush=True)  # fmt: skip
        yield one


def main() -> int:
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
    print(f"pack: {total} kernels for {', '.join(wanted)}, some {minutes:.0f} minutes", flush=True)
    build(args.folder, wanted, args.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
