"""Loads the compiled extension on import: ``_C``, and the op libraries that this torch can use."""

from pathlib import Path

import torch

from llmos_kernels import _C
from llmos_kernels._core import cuda_part

_FOLDER = Path(__file__).parents[1]

_C.cpu_level()  # Raises if LLMOS_CPU_LEVEL names an ISA that this CPU does not have.
torch.ops.load_library(_FOLDER / "_ops_cpu.so")
# The CUDA library calls functions of libtorch_cuda, which only a CUDA build of torch has.
#: The CUDA part, if it is loaded.
CUDA_PART = _FOLDER / "_ops_cuda.so"
if torch.backends.cuda.is_built() and CUDA_PART.exists():
    torch.ops.load_library(CUDA_PART)
    cuda_part.configure(CUDA_PART)
