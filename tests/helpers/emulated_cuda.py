"""The CUDA kernels as C++ on the CPU: threads are fibers, and faults of their order are errors.

``csrc/testing/simt.h`` says what is found. ``make build`` builds them.
"""

import contextlib
import ctypes
import functools
import warnings
from pathlib import Path

import torch

import llmos_kernels
from llmos_kernels._core.registry import DEFINED

LIBRARY = Path(llmos_kernels.__file__).parent / "_ops_emulated.so"
#: The devices of tests that run emulated kernels, too.
DEVICES = ("cpu", *["cuda"] * torch.cuda.is_available(), "emulated")
#: The bytes of accesses that are counted.
SIZES = (1, 2, 4, 8, 16)
#: The widest rows whose backward CUDA C++ computes; Triton has the others.
WIDEST_BACKWARD = 8192
OPS = (
    "add_layer_norm_forward",
    "embedding_layer_norm_forward",
    "int8_linear",
    "int8_matmul",
    "int8_norm",
    "int8_quantize",
    "int8_weight_only",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_forward",
)
#: An op that calls others, and hands nothing on.
WHOLE_LAYER = "encoder_layer"
#: Those of them that multiply matrices, and the most rows that they take.
PRODUCTS = {"int8_linear": 16, "int8_matmul": 16, "int8_weight_only": 16, "linear_forward": 4}


@functools.cache
def _library():
    """Load the library, and define its ops, and Triton's, by the reference.

    Kernels take any number of rows, but for products, which stop at 16.
    """
    definitions = torch.library.Library("llmos_emulated", "DEF")
    for name in OPS:
        schema = str(getattr(torch.ops.llmos, name).default._schema).removeprefix("llmos::")
        definitions.define(schema)
        definitions.define(schema.replace(name, f"{name}_triton", 1))
        reference = torch.no_grad()(DEFINED[f"llmos::{name}"].reference)
        definitions.impl(f"{name}_triton", reference, "CPU")
    schema = str(getattr(torch.ops.llmos, WHOLE_LAYER).default._schema)
    definitions.define(schema.removeprefix("llmos::"))
    torch.ops.load_library(LIBRARY)
    library = ctypes.CDLL(str(LIBRARY))
    _set_all_rows(library)
    return definitions, library


def _set_all_rows(library):
    for name in OPS:
        _set_rows(library, name, PRODUCTS.get(name, 2**62))


def _set_rows(library, name, rows):
    assert library.llmos_cuda_rows(name.encode(), 90, ctypes.c_int64(2**62), ctypes.c_int64(rows))


def kernel(op):
    """Return the emulated kernel of an overload of ``torch.ops.llmos``, or None."""
    name = op.name().partition("::")[2].partition(".")[0]
    if name not in (*OPS, WHOLE_LAYER):
        return None
    _library()
    overload = getattr(torch.ops.llmos_emulated, name).default
    # Not through the dispatcher: test modes see what the kernel allocates, as they do for others.
    return functools.partial(overload._op_dk, torch._C.DispatchKey.CPU)


def takes(op, args):
    """Return True if CUDA C++ computes a call itself."""
    if op.name() == "llmos::linear_forward":
        return len(args[0]) <= 4 and args[1].stride(0) == 1 < args[1].stride(1) and not args[6]
    return "norm_backward" not in op.name() or args[5] <= WIDEST_BACKWARD


@contextlib.contextmanager
def most_rows(name, rows):
    """Hand calls of an op with more rows to Triton's launcher; put all limits back at the end."""
    library = _library()[1]
    _set_rows(library, name, rows)
    yield
    _set_all_rows(library)


def threads(rows, d):
    """Return how many threads run on rows of ``d`` elements: eight elements each, whole warps."""
    of_row = min(-(-d // 256) * 32, 512)
    return rows * of_row


def seed(number):
    """Choose the order in which threads and blocks run."""
    _library()[1].llmos_simt_seed(ctypes.c_uint64(number))


def accesses():
    """Return the loads and stores since the last call, each by the bytes of an access."""
    counts = (ctypes.c_int64 * (2 * len(SIZES)))()
    _library()[1].llmos_simt_counts(counts)
    numbers = list(counts)
    loads, stores = numbers[: len(SIZES)], numbers[len(SIZES) :]
    return dict(zip(SIZES, loads, strict=True)), dict(zip(SIZES, stores, strict=True))


def plant(fault):
    """Run a kernel with a fault, and raise RuntimeError with what the emulation says of it."""
    message = ctypes.create_string_buffer(256)
    _library()[1].llmos_simt_plant(fault.encode(), message, len(message))
    if message.value:
        raise RuntimeError(message.value.decode())


@contextlib.contextmanager
def device_of(name):
    """Yield the device that a test is to use; for "emulated" its ops are the emulated ones.

    ``DEVICES`` are the names.
    """
    if name != "emulated":
        yield name
        return
    _library()
    overrides = torch.library.Library("llmos", "IMPL")
    try:
        with warnings.catch_warnings(action="ignore"):  # The kernels of CPUs are overridden.
            for op in OPS:
                emulated = getattr(torch.ops.llmos_emulated, op)
                overrides.impl(op, emulated, "CPU", allow_override=True)
        yield "cpu"
    finally:
        overrides._destroy()
