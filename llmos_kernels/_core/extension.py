"""Load what CMake built: ``_C`` and the op libraries, each where this torch can use it."""

from pathlib import Path

import torch

from llmos_kernels import _C

_FOLDER = Path(__file__).parents[1]

_C.cpu_level()  # Raises for a LLMOS_CPU_LEVEL that this machine does not have.
torch.ops.load_library(_FOLDER / "_ops_cpu.so")
# The shims that the CUDA part calls are in libtorch_cuda.
if torch.backends.cuda.is_built() and (_FOLDER / "_ops_cuda.so").exists():
    torch.ops.load_library(_FOLDER / "_ops_cuda.so")
