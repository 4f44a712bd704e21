"""Machine code of GPU kernels: tensor core instructions, load widths, prefetch, spills.

No GPU is needed.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from llmos_kernels._tools import machine_code

BEGIN = """
import itertools, torch
from llmos_kernels._tools import inspect
from llmos_kernels._tools.build_pack import recorded_launches
from llmos_kernels._core.registry import DEFINED
from llmos_kernels._triton.runtime import settings
from llmos_kernels.ops._activations import GELU_TANH, NONE
bf16 = torch.bfloat16
op = lambda name: DEFINED[f"llmos::{name}"].launch
def compiled(launches):
    found = [inspect.resources(launch, "sm_90") for launch in dict.fromkeys(launches)]
    assert not any(r.spills or r.instructions["LDL.32"] for r in found), "spills"
    return found
"""

ATTENTION = """
def attend(d, mask=None, padding=None, cu_seqlens=None, p=0.0, causal=0, queries=512):
    q, k, v, dout = (torch.empty(2, n, 4, d, dtype=bf16).transpose(1, 2)
                     for n in (queries, 512, 512, queries))
    if cu_seqlens is not None:
        q, k, v, dout = (t[:1] for t in (q, k, v, dout))
    options = d**-0.5, causal, p, 0.0, torch.empty(2, dtype=torch.int64)
    tensors = q, k, v, mask, padding, cu_seqlens, cu_seqlens, None
    out, stats = op("attention_forward")(*tensors, *options)
    bias = mask is not None and mask.is_floating_point()
    op("attention_backward")(dout, *tensors, out, stats, *options, bias)
padding = torch.empty(2, 512, dtype=torch.bool)
with recorded_launches("sm_90") as launches:
    for d in (64, 128):
        attend(d, causal=1)
        attend(d, padding=padding)
        attend(d, torch.empty(2, 1, 1, 512, dtype=torch.bool))
        attend(d, cu_seqlens=torch.empty(5, dtype=torch.int32))
        attend(d, torch.empty(1, 4, 512, 512))
        attend(d, padding=padding, p=0.1)
    attend(64, torch.empty(1, 1, 512, 512, dtype=bf16), p=0.1)
    attend(64, padding=padding, queries=60)
found = compiled(launches)
for r in found:
    assert r.mma_redundancy == 1, f"{r.launch}: the same products {r.mma_redundancy} times"
    assert r.matrix == "HGMMA", f"{r.launch}: {r.matrix}"
    if dict(r.launch.signature).get("mask") != "*bf16":
        assert "bf16" not in r.unpipelined_loads, f"{r.launch}: no prefetch of bf16 tiles"
# Warps that repeat the products of others are detected.
slow = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
with recorded_launches("sm_90") as launches, settings.override("attention forward", slow):
    attend(64)
assert compiled(launches[:1])[0].mma_redundancy == 2
print(len(found), "kernels")
"""

PRODUCTS = """
seed = torch.empty(2, dtype=torch.int64)
with recorded_launches("sm_90") as launches:
    shapes = (1024, 768, 3072), (8192, 1024, 4096), (64, 384, 1536), (8, 1024, 4096)
    for rows, d, hidden in shapes:
        x, h, weight1, bias, weight2 = (
            torch.empty(shape, dtype=bf16)
            for shape in ((rows, d), (rows, hidden), (hidden, d), (hidden,), (d, hidden))
        )
        op("linear_forward")(x, weight1, bias, GELU_TANH, 0.1, seed, True)
        if rows > 16:
            op("linear_dinput")(x, weight2, h, GELU_TANH, 0.1, seed)
        weight, scale = torch.empty(hidden, d, dtype=torch.int8), torch.empty(hidden)
        op("int8_linear")(x, weight, scale, None, bias, NONE, 0.0)
    op("int8_weight_only")(x, weight, scale, bias, NONE)
found = compiled(launches)
for r in found:
    if r.launch.name.rpartition("_")[0].endswith(("quantize", "parts", "_sum")):
        continue
    tall = dict(r.launch.constants)["BLOCK_M"] >= 64
    integers = r.launch.signature[0][1] == "*i8"
    assert r.mma_redundancy == 1, f"{r.launch}: the same products {r.mma_redundancy} times"
    expected = ("I" if integers else "H") + ("GMMA" if tall else "MMA")
    assert r.matrix == expected, f"{r.launch}: {r.matrix}"
    if "persistent" not in r.launch.name:  # Its loop also contains the epilogue.
        assert not r.unpipelined_loads, f"{r.launch}: no prefetch of {r.unpipelined_loads}"
    wide = r.instructions["LDGSTS.128"] + 4 * r.instructions["UTMALDG"]
    assert wide >= 12, f"{r.launch}: {r.vectors}"
print(len(found), "kernels")
"""

ROWS = """
with recorded_launches("sm_90") as launches:
    for d, p in itertools.product((384, 1024, 2048, 4096), (0.0, 0.1)):
        x, weight = torch.empty(64, d, dtype=bf16), torch.empty(d, dtype=bf16)
        stats = torch.empty(2, 64)
        seed = torch.empty(2, dtype=torch.int64)
        op("add_layer_norm_forward")(x, x, weight, weight, d, 1e-5, True, p, seed)
        op("layer_norm_backward")(x, x, x, weight, stats, d, True, p, seed, True, True)
found = [r for r in compiled(launches) if "_sum" not in r.launch.name]
for r in found:
    # Rows are loaded 16 bytes per thread; statistics, the seed and weights of short rows less.
    counts, rows = r.instructions, 2 if "forward" in r.launch.name else 3
    assert counts["LDG.128"] >= rows, f"{r.launch}: {r.vectors}"
    narrow = counts["STG.16"] + counts["LDG.8"]
    assert counts["STG.128"] >= 1 and not narrow, f"{r.launch}: {r.vectors}"
    if "backward" in r.launch.name:  # With more registers fewer thread blocks run at a time.
        warps = dict(r.launch.options)["num_warps"]
        assert r.registers <= {8: 80, 16: 64}[warps], f"{r.launch}: {r.registers} registers"
print(len(found), "kernels")
"""


@pytest.mark.parametrize("script, least", [("ATTENTION", 25), ("PRODUCTS", 10), ("ROWS", 15)])
def test_sm_90(script, least):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BEGIN + globals()[script]]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= least


def test_instructions():
    """Names and widths of instructions are read from a disassembly."""
    from llmos_kernels._tools import machine_code

    listing = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
                                                             /* 0x000fe20000000800 */
        /*0010*/              @!P1 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x00 */
        /*0020*/              @UP0 LDG.E.U16 R4, desc[UR4][R2.64] ;  /* 0x00 */
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;  /* 0x00 */
        /*12f0*/                   STL.64 [R1+0x8], R2 ;  /* 0x00 */
        /*1300*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT ;  /* 0x00 */
    """
    counts = Counter(map(machine_code._kind, machine_code._INSTRUCTION.findall(listing)))
    expected = {"LDC": 1, "LDG.128": 1, "LDG.16": 1, "LDG.32": 1, "STL.64": 1, "HGMMA": 1}
    assert counts == expected
    assert machine_code.widths(counts, "LDG", "LDGSTS") == {128: 1, 16: 1, 32: 1}


IR = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], \
instrShape = [16, 32, 16]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [2, 2], \
instrShape = [16, 8]}>
    %0 = tt.load %a : tensor<64x64x!tt.ptr<bf16>, #blocked> loc(#loc)
    %1 = scf.for %i = %c0 to %n step %c1 iter_args(%x = %y) -> (i32)  : i32 {
      %2 = tt.load %b : tensor<32x64x!tt.ptr<bf16>, #blocked> loc(#loc)
      %3 = scf.for %j = %c0 to %n step %c1 iter_args(%z = %y) -> (i32)  : i32 {
        %4 = tt.load %c : tensor<64x!tt.ptr<f32>, #blocked> loc(#loc)
        %5 = tt.load %d, %m, %o : tensor<32x64x!tt.ptr<i8>, #blocked> loc(#loc)
        %6 = ttng.warp_group_dot %5, %5, %0 : !ttg.memdesc<> * !ttg.memdesc<> \
-> tensor<ROWSx32xf32, #mma> loc(#loc)
        %7 = tt.dot %5, %5, %0 : tensor<> * tensor<> -> tensor<32x16xf32, #mma1> loc(#loc)
      } loc(#loc)
    } loc(#loc)
"""


@pytest.mark.parametrize("rows, times", [(64, 2), (128, 1), (256, 1), (16, 8)])
def test_repeated(rows, times):
    from llmos_kernels._tools import machine_code

    assert machine_code.mma_redundancy(IR.replace("ROWS", str(rows))) == times


def test_waited_for():
    """Only tiles in the loop with products count: no loads before it, and no vectors."""
    from llmos_kernels._tools import machine_code

    assert machine_code.unpipelined_loads(IR) == ["i8"]
    assert (
        machine_code.unpipelined_loads(IR.replace("tt.dot", "dot").replace("group_dot", "g")) == []
    )


CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
FAMILIES = ("embedding", "int8", "int8_norm", "norm", "norm_backward", "sparse")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_kernels_use_whole_words_and_no_local_memory(family, arch, tmp_path):
    """In CUDA C++ packs are read and written 16 bytes at a time, and nothing is spilled."""
    from llmos_kernels._tools import inspect_cuda

    cubin, headers = tmp_path / "kernels.cubin", Path(torch.__file__).parent / "include"
    options = ["-std=c++20", "-O3", f"-arch={arch}", "-cubin", "-DUSE_CUDA"]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(headers)]
    command = ["nvcc", *options, "-o", str(cubin), str(CSRC / f"{family}.cu")]
    subprocess.run(command, check=True)
    kernels = list(inspect_cuda.kernels(cubin, arch))
    assert len(kernels) >= 9
    for kernel in kernels:
        assert kernel.stack == 0, f"{kernel.name} spills {kernel.stack} bytes"
        if "<" not in kernel.name:
            continue  # The symbol: there is no c++filt.
        pack = next((int(n) for n in re.findall(r", (\d+)[,>]", kernel.name)[-1:]), 1)
        stores = machine_code.widths(kernel.instructions, "STG")
        if family in ("embedding", "norm", "norm_backward") and pack > 1:
            assert stores.get(128, 0) > 1 and sum(stores.values()) - stores[128] <= 2, kernel
