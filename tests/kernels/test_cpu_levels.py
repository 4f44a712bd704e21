"""Run the tests of every op with the CPU kernels of each ISA that this machine has."""

import ctypes
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmos_kernels
from llmos_kernels import _C

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("level", _C.cpu_levels()[:-1])
def test_level(level):
    names = ("ops/test_ops", "kernels/test_kernels", "ops/test_int8", "ops/test_int8_linear")
    files = [TESTS / f"{name}.py" for name in names]
    args = ["-q", "-p", "no:cacheprovider", *files]
    chosen = "matches_reference or layouts or guard or masks or alone or integers or extreme"
    chosen = ["-k", f"({chosen}) and not triton"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *args, *chosen],
        env=os.environ | {"LLMOS_CPU_LEVEL": level, "LLMOS_SKIP_TRITON": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_the_level_in_use():
    wanted = os.environ.get("LLMOS_CPU_LEVEL") or _C.cpu_levels()[-1]
    assert _C.cpu_level() == wanted


def isas_by_kernel():
    """Return the instruction sets that have a build of their own, for each (kernel, dtype)."""
    library = ctypes.CDLL(str(Path(llmos_kernels.__file__).parent / "_ops_cpu.so"))
    library.llmos_kernel_table.restype = ctypes.c_char_p
    lines = library.llmos_kernel_table().decode().splitlines()
    return {(kernel, dtype): isas for kernel, dtype, *isas in map(str.split, lines)}


#: Kernels with AMX code. The others use their avx512_bf16 build on a CPU with AMX.
AMX_KERNELS = {
    "linear_forward",
    "linear_panels",
    "panel_bytes",
    "linear_gemv",
    "linear_sparse_gemv",
    "linear_dinput",
    "linear_dweight",
    "activation",
    "attention_forward",
    "attention_combine",
    "attention_weights",
    "attention_backward",
    "attention_mask_backward",
    "int8_gemm",
    "int8_gemv",
    "int8_vnni_weight",
    "int8_weight_only",
    "multiply_adds",
}
OTHER_KERNELS = {
    "int8_quantize",
    "int8_zero_point",
    "norm_forward",
    "norm_backward",
    "sum_partials",
    "to_float",
    "add_to",
    "sum_embeddings",
    "drop_rows",
}
#: Kernels that compute in int8 whatever the dtype of the result, so that VNNI helps all dtypes.
INT8_KERNELS = {"int8_quantize", "int8_gemm", "int8_gemv", "int8_vnni_weight", "int8_zero_point"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets of x86")
@pytest.mark.skipif(_C.build["sanitize"], reason="a sanitizer build has fewer instruction sets")
def test_isa_of_each_kernel():
    gnu = re.match(r"GNU (\d+)", _C.build["compiler"])
    has_amx = not gnu or int(gnu[1]) >= 11
    found = isas_by_kernel()
    assert {kernel for kernel, _ in found} == AMX_KERNELS | OTHER_KERNELS
    for (kernel, dtype), isas in found.items():
        expected = ["baseline", "avx2", "avx512"]
        if dtype in ("bfloat16", "int8") or kernel in INT8_KERNELS:
            expected += ["avx512_bf16"]
            expected += ["amx"] if kernel in AMX_KERNELS and has_amx else []
        assert isas == expected, (kernel, dtype)
