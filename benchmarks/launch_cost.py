"""Measure the host's time for a launch, from the pack and by Triton.

    python benchmarks/launch_cost.py [FILE]

On a GPU this uses its driver; elsewhere a driver that does nothing (tests/helpers/fake_cuda.c), so
that the time is that of the launchers alone. It prints microseconds for each kernel, side by side
in one run, and writes JSON to the file given.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton

from llmos_kernels._tools import build_pack
from llmos_kernels._triton.attention import forward as attention
from llmos_kernels._triton.gemm import linear
from llmos_kernels._triton.norm import layer_norm
from llmos_kernels._triton.runtime import kernel_pack, pack_shapes
from llmos_kernels._triton.runtime import launch as launching
from llmos_kernels._triton.runtime.launch import OPTIONS, Kernel, parameters
from llmos_kernels.ops._activations import GELU
from llmos_kernels.ops._attention_arguments import NOT_CAUSAL
from llmos_kernels.testing import interleaved

ROOT = Path(__file__).resolve().parent.parent
FOLDER = tempfile.TemporaryDirectory()
LIBRARY = Path(FOLDER.name) / "libcuda.so.1"


def fake_driver():
    """Make Triton use a CUDA library that does nothing, and return the library."""
    source = ROOT / "tests" / "helpers" / "fake_cuda.c"
    options = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *options, "-o", LIBRARY, source], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = FOLDER.name
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Driver(CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: (9, 0)

    library = ctypes.CDLL(str(LIBRARY))
    triton.runtime.driver.set_active(Driver())
    return library


def calls(device: str):
    """Yield names, launchers and their arguments."""

    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device=device)

    row, weight, bias = empty(768), empty(3072, 768), empty(3072)
    finish = GELU, 0.0, None, False
    yield "layer_norm", layer_norm.forward, (empty(1024, 768), row, row, 768, 1e-5, True)
    yield "linear, gelu", linear.forward, (empty(64, 768), weight, bias, *finish)
    yield "linear by tensor descriptors", linear.forward, (empty(8192, 768), weight, bias, *finish)
    call = next(pack_shapes.attention(((None, True, NOT_CAUSAL, 0.1),))).forward()
    call = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in call)
    yield "attention, padding, dropout", attention.forward, call


def measured(launcher, args, arch: str, library) -> tuple[int, float, float]:
    """Return the number of arguments, and the seconds of a launch from the pack and by Triton."""
    launches = []

    def keep(self, grid, given, named):
        launches.append((self, grid, given, named))

    with mock.patch.object(Kernel, "launch", keep):
        launcher(*args)
    with build_pack.recorded_launches(arch) as wanted:
        launcher(*args)
    ((kernel, grid, given, named),) = launches
    build_pack.build(Path(FOLDER.name) / "pack", {arch: wanted})
    pack = kernel_pack.Pack(Path(FOLDER.name) / "pack" / f"{arch}.json")
    ((entry,),) = pack.index["kernels"].values()
    if library is not None:
        sizes = entry["parameters"]
        ctypes.c_size_t.in_dll(library, "fake_count").value = len(sizes)
        (ctypes.c_size_t * 96).in_dll(library, "fake_sizes")[: len(sizes)] = sizes
    packed = pack.kernel(kernel.name, parameters(kernel), OPTIONS)

    def by(found):
        def launch():
            kernel.pack_kernels[0] = found
            kernel[grid](*given, **named)

        return launch

    return len(given) + len(named), *interleaved([by(packed), by(None)], rounds=100)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    library = None if device == "cuda" else fake_driver()
    arch = kernel_pack.arch_of(0) if device == "cuda" else "sm_90"
    rows = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(build_pack.planned_for(arch))
        if device == "cpu":
            stack.enter_context(mock.patch.object(launching, "current", lambda: (0, 0)))
        for name, launcher, args in calls(device):
            count, ours, tritons = measured(launcher, args, arch, library)
            rows[name] = {"arguments": count, "pack_us": ours * 1e6, "triton_us": tritons * 1e6}
            print(
                f"{name:28} {count} arguments: pack {ours * 1e6:5.2f} us, Triton "
                f"{tritons * 1e6:5.2f} us, {tritons / ours:.1f} times as long"
            )
    if len(sys.argv) > 1:
        name = torch.cuda.get_device_name() if device == "cuda" else "a driver that does nothing"
        about = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
        Path(sys.argv[1]).write_text(json.dumps(about | {"launches": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
