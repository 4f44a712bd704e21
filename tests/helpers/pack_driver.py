"""Checks that test_pack.py runs in a separate process, with the CUDA driver of fake_cuda.c.

That driver has no GPU and stores the arguments of the last launch.

    python pack_driver.py launches sm_90 libcuda.so.1 FOLDER
    python pack_driver.py refused sm_90 libcuda.so.1 FOLDER   # uses the pack of ``launches``
    python pack_driver.py undriven sm_90 FOLDER   # without that driver
"""

import ctypes
import importlib
import itertools
import struct
import sys
import threading
from pathlib import Path
from unittest import mock

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from llmos_kernels._core.registry import DEFINED
from llmos_kernels._tools import build_pack
from llmos_kernels._triton.runtime import kernel_pack
from llmos_kernels._triton.runtime import launch as launching
from llmos_kernels._triton.runtime.launch import OPTIONS, Kernel, parameters
from llmos_kernels.ops._activations import RELU

STREAM = 0x5EED


class DriverLaunch(ctypes.Structure):
    """``struct Launch`` of fake_cuda.c: the last launch."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("bytes", (ctypes.c_ubyte * 128) * 96),
    )


def passed(launch: build_pack.Launch, values: dict, entry: dict) -> list:
    """Return the expected bytes of each kernel parameter; None where the driver chooses them."""
    found: list = []
    boxes = [block for *_, block in entry["descriptors"]]
    for name, kind in launch.signature:
        value = values[name]
        if kind == "constexpr":
            continue
        if isinstance(value, TensorDescriptor):
            (rows, cols), (step, _) = value.shape, value.strides
            box = boxes.pop(0)
            size = value.base.itemsize
            # Type, rank, base, sizes, stride, box, element strides, interleave, swizzle, promotion.
            # Drivers up to 13.1 also set bit 21 for small matrices, where the launcher must clear
            # it.
            small = ((cols - 1) + (rows - 1) * step) * size + 1 < 128 * 1024
            words = [
                None,
                2 if small else 2 | 1 << 21,
                value.base.data_ptr(),
                cols,
                rows,
                step * size,
                *reversed(box),
            ]
            found += [words + [1, 1, 0, None, 2, 0]]
            found += [struct.pack("<i", n) for n in value.shape]
            found += [struct.pack("<q", n) for n in value.strides]
        elif isinstance(value, torch.Tensor):
            found.append(struct.pack("<Q", value.data_ptr()))
        elif isinstance(value, float):
            found.append(struct.pack("<f", value))
        else:
            found.append(struct.pack("<i" if kind == "i32" else "<q", value))
    return found + [bytes(8), bytes(8)]


def launches(arch: str, library: str, folder: str) -> None:
    """Compile two variants of every kernel into a pack, launch them, and check what the driver got.

    Grid, threads, shared memory, stream and the bytes of each parameter must be those of the call.
    """
    fake = ctypes.CDLL(library)
    integer = lambda name: ctypes.c_int.in_dll(fake, name)
    integer("fake_strict").value = 1
    last = DriverLaunch.in_dll(fake, "fake_last")
    sizes = (ctypes.c_size_t * 96).in_dll(fake, "fake_sizes")
    count = ctypes.c_size_t.in_dll(fake, "fake_count")

    chosen: dict[str, list[build_pack.Launch]] = {}
    for variant in build_pack.variants(arch):
        some = chosen.setdefault(variant.name, [])
        if len(some) < 2:
            some.append(variant)
    build_pack.build(Path(folder), {arch: list(itertools.chain(*chosen.values()))}, jobs=2)
    pack = kernel_pack.Pack(Path(folder) / f"{arch}.json")
    entries = {
        (name, v["key"]): v for name, listed in pack.index["kernels"].items() for v in listed
    }
    seen = set()
    real = Kernel.launch

    def run(self, grid, args, kwargs):
        launch = build_pack.launch_of(self, args, dict(kwargs))
        entry = entries.get((self.name, launch.key))
        if entry is None:
            return
        count.value = len(entry["parameters"])
        for i, size in enumerate(entry["parameters"]):
            sizes[i] = size
        before = integer("fake_launches").value
        integer("fake_shared").value = 0
        real(self, grid, args, kwargs)
        assert integer("fake_launches").value == before + 1
        assert tuple(last.grid) == (*grid, 1, 1)[:3]
        assert (last.threads, last.shared, last.stream) == (
            kwargs.get("num_warps", 4) * 32,
            entry["shared"],
            STREAM,
        )
        first = (self.name, launch.key) not in seen
        allowed = entry["shared"] if first and entry["shared"] > 48 * 1024 else 0
        assert integer("fake_shared").value == allowed
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        expected = passed(launch, values, entry)
        assert len(expected) == count.value, (self.name, expected)
        for i, value in enumerate(expected):
            got = bytes(last.bytes[i])
            if isinstance(value, list):
                words = struct.unpack("<16Q", got)
                pairs = zip(words, value, strict=False)
                assert all(b is None or a == b for a, b in pairs), (self.name, i, words, value)
            else:
                assert got[: sizes[i]] == value, (self.name, i)
        seen.add((self.name, launch.key))

    with (
        mock.patch.object(Kernel, "launch", run),
        mock.patch.object(launching, "current", lambda: (0, STREAM)),
        mock.patch.object(kernel_pack, "for_device", lambda device: pack),
        build_pack.planned_for(arch),
    ):
        for launcher, args in build_pack.calls():
            launcher(*args)
    assert seen == entries.keys()
    assert integer("fake_loads").value == len(seen)  # Each cubin is loaded once.
    print(len(seen), "variants of", len(chosen), "kernels")


class Pointer:
    """Stand in for a tensor at an address."""

    def __init__(self, address: int, dtype: torch.dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def refused(arch: str, library: str, folder: str) -> None:
    """Print the errors of launches that must be refused; then launch from eight threads at once."""
    fake = ctypes.CDLL(library)
    integer = lambda name: ctypes.c_int.in_dll(fake, name)
    sizes = (ctypes.c_size_t * 96).in_dll(fake, "fake_sizes")
    count = ctypes.c_size_t.in_dll(fake, "fake_count")
    count.value = 6
    sizes[:6] = 8, 8, 4, 4, 8, 8
    named = {"num_warps": 4}

    def kernel():
        pack = kernel_pack.Pack(Path(folder) / f"{arch}.json")
        name = "gemm.gemm:_sum_kernel"
        (first, *_) = pack.index["kernels"][name]
        blocks = [int(t[1:]) for t in first["key"].partition(";")[0].split(",") if t[0] == "="]
        named.update(zip(("PARTS_AT_ONCE", "BLOCK_M", "BLOCK_N"), blocks, strict=True))
        fn = importlib.import_module("llmos_kernels._triton.gemm.gemm")._sum_kernel
        return pack.kernel(name, parameters(fn), OPTIONS)

    def launch(kernel, out=1 << 20, grid=(2,), **overrides):
        pointers = Pointer(1 << 21, torch.float32), Pointer(out, torch.bfloat16)
        return kernel.launch(0, STREAM, grid, (*pointers, 768, 3), named | overrides)

    def error(call, *given, **named):
        try:
            call(*given, **named)
        except (RuntimeError, ValueError) as e:
            return f"{type(e).__name__}: {e}"
        raise AssertionError("no error")

    made = kernel()
    assert launch(made, num_warps=8) is False and launch(made, other=1) is False
    assert launch(made, out=(1 << 20) + 4) is False, "misaligned"
    assert launch(made, grid=(0,)) is True and integer("fake_launches").value == 0
    print(error(launch, made, out=16))
    sizes[2] = 8
    print(error(launch, kernel()))
    sizes[2] = 4
    count.value = 7
    print(error(launch, kernel()))
    count.value = 6
    integer("fake_broken_images").value = 1
    print(error(launch, kernel()))
    integer("fake_broken_images").value = 0

    before, integer("fake_strict").value = integer("fake_loads").value, 1
    shared, barrier = kernel(), threading.Barrier(8)

    def work():
        barrier.wait()
        for _ in range(100):
            assert launch(shared)
        assert integer("fake_capture_mode").value == 0, "not restored"

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert integer("fake_loads").value == before + 1
    assert integer("fake_launches").value == 800
    print("800 launches by 8 threads")


def undriven(arch: str, folder: str) -> None:
    """Print the error of a launch without a CUDA driver."""
    z = torch.empty(4, 1536, dtype=torch.bfloat16)
    pack = kernel_pack.Pack(Path(folder) / f"{arch}.json")
    with (
        mock.patch.object(launching, "current", lambda: (0, STREAM)),
        mock.patch.object(kernel_pack, "for_device", lambda device: pack),
    ):
        try:
            DEFINED["llmos::activation_forward"].launch(z, RELU, 0.0, None)
        except RuntimeError as e:
            print(f"{type(e).__name__}: {e}")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
