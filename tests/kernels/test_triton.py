"""Triton kernels without a GPU: compiled for every architecture, and in the interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from llmos_kernels._core.registry import DEFINED
from llmos_kernels.testing import DTYPES, assert_accurate, cast, run

pytest.importorskip("triton")
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMPERE = ARCHS[:3]

# The interpreter replaces the compiler in a whole process, so kernels are compiled in another one.
NORMS = """
import sys, torch
from llmos_kernels._tools import inspect
names = ("layer_norm", "add_layer_norm-dropout", "rms_norm", "embedding", "embedding-dropout")
launches = inspect.launches((torch.float32, torch.bfloat16), (64, 768, 8192, 32768), names)
"""

ATTENTION = """
import sys, torch
from llmos_kernels._tools import inspect
from llmos_kernels._core.registry import DEFINED
forward, weights, backward = (
    DEFINED[f"llmos::attention_{name}"].launch for name in ("forward", "weights", "backward")
)
def attend(d, dtype, mask=None, padding=None, cu_seqlens=None, causal=1, dropout_p=0.0, keys=512,
           softcap=0.0, sinks=None):
    queries = 1 if keys > 512 else keys
    q, k, v, dout = (torch.empty(2, n, 4, d, dtype=dtype).transpose(1, 2)
                     for n in (queries, keys, keys, queries))
    if cu_seqlens is not None:
        q, k, v, dout = (t[:1] for t in (q, k, v, dout))
    seed = torch.empty(2, dtype=torch.int64)
    tensors = q, k, v, mask, padding, cu_seqlens, cu_seqlens, sinks
    options = d**-0.5, causal, dropout_p, softcap, seed
    out, stats = forward(*tensors, *options)
    if cu_seqlens is None:
        weights(q, k, mask, padding, stats, *options, False)
    backward(dout, *tensors, out, stats, *options, mask is not None and mask.is_floating_point())
bf16 = torch.bfloat16
mask = torch.empty(1, 4, 512, 512)
padding = torch.empty(2, 512, dtype=torch.bool)
with inspect.recorded_launches(sys.argv[1]) as launches:
    for d in (64, 128, 256):
        attend(d, bf16)
        attend(d, bf16, mask > 0, causal=0)
        attend(d, bf16, keys=2048, causal=0)
    for d in (64, 128):
        attend(d, bf16, mask, dropout_p=0.1)
        attend(d, torch.float32)
    attend(64, bf16, padding=padding, dropout_p=0.1)
    attend(64, bf16, cu_seqlens=torch.empty(5, dtype=torch.int32), dropout_p=0.1)
    for d, dtype in ((64, bf16), (128, bf16), (256, bf16), (64, torch.float32)):
        attend(d, dtype, softcap=50.0, sinks=torch.empty(4))
    attend(128, bf16, keys=2048, causal=0, softcap=50.0, sinks=torch.empty(4, dtype=bf16))
launches = list(dict.fromkeys(launches))
"""

LINEAR = """
import sys, torch
from llmos_kernels._tools import inspect
from llmos_kernels._core.registry import DEFINED
from llmos_kernels.ops._activations import GELU, NONE, RELU
forward, dinput, dweight = (
    DEFINED[f"llmos::linear_{name}"].launch for name in ("forward", "dinput", "dweight")
)
activate, slopes = (
    DEFINED[f"llmos::activation_{name}"].launch for name in ("forward", "backward")
)
plain = NONE, 0.0, None
bf16 = torch.bfloat16
def feed_forward(rows, d, hidden, dtype, activation, dropout_p=0.0):
    x, h, weight1, bias, weight2 = (
        torch.empty(shape, dtype=dtype)
        for shape in ((rows, d), (rows, hidden), (hidden, d), (hidden,), (d, hidden))
    )
    dropout = activation, dropout_p, torch.empty(2, dtype=torch.int64)
    forward(x, weight1, bias, *dropout, activation == GELU)
    forward(h, weight2, None, *plain, False)
    dinput(x, weight2, h, *dropout)
    dinput(h, weight1, None, *plain)
    dweight(x, h, True)
    dweight(h, x, False)
    activate(h, *dropout)
    slopes(h, h, *dropout)
def decode(rows, k, n, dtype, by_columns=False):
    weight = torch.empty(k, n, dtype=dtype).mT if by_columns else torch.empty(n, k, dtype=dtype)
    forward(torch.empty(rows, k, dtype=dtype), weight, None, *plain, False)
with inspect.recorded_launches() as launches:
    feed_forward(1024, 768, 3072, bf16, GELU, 0.1)
    feed_forward(1024, 768, 3072, torch.float32, RELU)
    feed_forward(64, 384, 1536, bf16, RELU, 0.1)
    for dtype in (bf16, torch.float32):
        decode(12, 4096, 768, dtype)
        decode(3, 3072, 768, dtype, by_columns=True)
launches = list(dict.fromkeys(launches))
"""

INT8 = """
import sys, torch
from llmos_kernels._tools import inspect
launches = inspect.launches((torch.float32, torch.bfloat16), names=("int8",))
"""

# Check the limits of what the scripts above launch, and warp-group instructions on sm_90.
CHECK = """
from llmos_kernels._triton.runtime.launch import WGMMA_ARCHS
print(len(launches), "kernels")
for launch in launches:
    if len(sys.argv) > 2:
        compiled = inspect.resources_of_ampere(launch, sys.argv[1:])
    else:
        compiled = [inspect.resources(launch, sys.argv[1])]
    of = dict(launch.constants)
    given = {name for name, kind in launch.signature if kind != "constexpr"}
    # With a mask, dropout and a head dim of 128 the registers do not suffice by a few bytes.
    spilled = 32 if of.get("D") == 128 and {"mask", "seed"} <= given else 0
    for r in compiled:
        assert r.spills <= spilled, f"{launch} for {r.arch}: {r.spills} bytes spilled"
        limit = (227 if r.arch in WGMMA_ARCHS else 99) * 1024
        assert r.shared <= limit, f"{launch} for {r.arch}: {r.shared} bytes of shared memory"
        assert not r.overflows, f"{launch}: 32-bit offsets {r.overflows}"
        names = "_forward_kernel", "_dinput_kernel", "_dweight_kernel", "_product_kernel"
        product = launch.name.rpartition(":")[2] in names
        tall = of.get("BLOCK_M", 0) >= 64
        if r.arch == "sm_90" and product and tall and launch.signature[0][1] != "*fp32":
            assert r.wgmma, launch
"""

SCRIPTS = (NORMS, ATTENTION, LINEAR, INT8)


def compiled(script, *archs):
    """Run ``script`` in another process for ``archs``; return the lines that it prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script, *archs], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "scripts", [(ATTENTION,), (NORMS, LINEAR, INT8)], ids=["attention", "rest"]
)
@pytest.mark.parametrize("archs", [AMPERE, *((arch,) for arch in ARCHS[3:])], ids=lambda a: a[0])
def test_compiles_within_limits(archs, scripts):
    """Kernels compile within the limits of spills, shared memory and 32-bit offsets.

    One process runs several scripts: its start takes as long as to compile a dozen kernels.
    """
    lines = compiled("".join(script + CHECK for script in scripts), *archs)
    assert len(lines) == len(scripts) and min(int(line.split()[0]) for line in lines) >= 20


def test_one_ptx_for_ampere():
    """sm_80, sm_86 and sm_89 have the same settings and PTX, so one compilation tests all three."""
    script = """
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # It would contain the path of the sources.
for launch in launches[::25]:
    ptx = {launch.compile(arch).asm["ptx"].replace(f".target {arch}", "") for arch in archs}
    assert len(ptx) == 1, launch
"""
    same = "assert launches == recorded.setdefault('first', launches)\n"
    rounds = "".join(f"sys.argv[1] = {arch!r}\n{ATTENTION}{same}" for arch in AMPERE)
    begin = "import os, sys\narchs, recorded = sys.argv[1:], {}\n"
    compiled(begin + rounds + "".join(each + script for each in SCRIPTS), *AMPERE)


PERSISTENT = """
import sys, torch
from llmos_kernels._tools import inspect
from llmos_kernels._core.registry import DEFINED
from llmos_kernels._triton.runtime import launch
from llmos_kernels.ops._activations import GELU, RELU
launch.has_wgmma = lambda device: True
forward, dinput = (DEFINED[f"llmos::linear_{name}"].launch for name in ("forward", "dinput"))
with inspect.recorded_launches() as launches:
    for rows, activation in ((2048, GELU), (8192, GELU), (8192, RELU)):
        x, h, weight1, bias, weight2 = (
            torch.empty(shape, dtype=torch.bfloat16)
            for shape in ((rows, 1024), (rows, 4096), (4096, 1024), (4096,), (1024, 4096))
        )
        dropout = activation, 0.1, torch.empty(2, dtype=torch.int64)
        forward(x, weight1, bias, *dropout, activation == GELU)
        dinput(x, weight2, h, *dropout)
launches = [k for k in dict.fromkeys(launches) if "persistent" in k.name]
assert len({dict(k.constants)["BLOCK_N"] for k in launches}) == 2
print(len(launches), "kernels")
for launch in launches:
    r, ptx = inspect.resources(launch, sys.argv[1]), launch.compile(sys.argv[1]).asm["ptx"]
    assert r.spills == 0, f"{launch}: {r.spills} bytes spilled"
    assert r.shared <= 227 * 1024, f"{launch}: {r.shared} bytes of shared memory"
    assert not r.overflows, f"{launch}: 32-bit offsets {r.overflows}"
    assert "cp.async.bulk.tensor" in ptx, launch
    assert r.wgmma or "tcgen05.mma" in ptx, launch
"""


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_persistent_products_compile(arch):
    """Persistent products use the tensor memory accelerator, within the limits of its GPUs."""
    assert int(compiled(PERSISTENT, arch)[0].split()[0]) >= 6


def test_persistent_products(monkeypatch):
    """Persistent products are right with partial tiles and two tiles per thread block.

    ``plan`` returns None for products that other kernels compute.
    """
    from llmos_kernels._triton.gemm import persistent
    from llmos_kernels._triton.runtime import launch
    from llmos_kernels.ops import _products
    from llmos_kernels.ops._activations import GELU

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not launch.has_wgmma(torch.device(device)):
        pytest.skip("this GPU has no tensor memory accelerator")
    monkeypatch.setattr(launch, "has_wgmma", lambda device: True)
    monkeypatch.setattr(persistent, "_TILES", ((128, 128, 64, 8, 4, 2),))
    monkeypatch.setattr(persistent, "_multiprocessors", lambda device: 2)
    forward, dinput = (DEFINED[f"llmos::linear_{name}"].launch for name in ("forward", "dinput"))
    seed = torch.tensor([3, 4], device=device)
    dropout = GELU, 0.1, seed
    for dtype in (torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        x, weight, bias, dout, kept = (
            torch.randn(shape, device=device, dtype=dtype)
            for shape in ((130, 72), (264, 72), (264,), (130, 264), (130, 72))
        )
        weight /= 8
        assert persistent.plan("linear", x, weight, transpose_b=True)[0] == (2,)
        assert persistent.plan("linear", dout, weight, transpose_b=False)[0] == (2,)
        calls = (
            (forward, _products._forward_reference, (x, weight, bias, *dropout, True)),
            (forward, _products._forward_reference, (x, weight, None, GELU, 0.0, None, False)),
            (dinput, _products._dinput_reference, (dout, weight, kept, *dropout)),
        )
        for launcher, reference, args in calls:
            exact = reference(
                *(a.double() if torch.is_tensor(a) and a is not seed else a for a in args)
            )
            for values in zip(launcher(*args), exact, reference(*args), strict=True):
                assert_accurate(*values, launcher.__name__)
    odd = x[:, :71]
    assert persistent.plan("linear", x.float(), weight.float(), True) is None
    assert persistent.plan("linear", odd.contiguous(), weight[:, :71].contiguous(), True) is None
    assert persistent.plan("linear", x, weight.mT.contiguous().mT, True) is None
    assert persistent.plan("linear", x[:100], weight[:100], True) is None


LONG_SUMS = {
    "few rows": ("forward", (5, 2100), (40, 2100)),
    "few rows, by columns": ("forward", (3, 1100), (40, 1100)),
    "dinput": ("dinput", (20, 2100), (2100, 40)),
    "dweight": ("dweight", (2100, 40), (2100, 24)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LONG_SUMS)
def test_sums_in_parts(name, dtype):
    """Long sums of few tiles are split between thread blocks (split-K); no Case has one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    which, *shapes = LONG_SUMS[name]
    op = DEFINED[f"llmos::linear_{which}"]
    torch.manual_seed(0)
    a, b = (torch.randn(shape, device=device) * shape[-1] ** -0.25 for shape in shapes)
    a, b = a.to(dtype), b.to(dtype)
    dropout = 3, 0.2, torch.randint(2**62, (2,), device=device)
    if name.endswith("columns"):
        b = b.mT.contiguous().mT
    if which == "forward":
        args = a, b, torch.randn(len(b), device=device).to(dtype), *dropout, True
    elif which == "dinput":
        args = a, b, torch.randn(20, 40, device=device).to(dtype), *dropout
    else:
        args = a, b, True
    exact = op.reference(*cast(args, torch.float64))
    for i, values in enumerate(zip(run(op.launch, args), exact, op.reference(*args), strict=True)):
        assert_accurate(*values, what=f"{name}, output {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4])
def test_skipped_columns_are_not_read(rows, dtype):
    """Weight columns whose input is 0 in all rows are not read: here they are NaN."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forward = DEFINED["llmos::linear_forward"].launch
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 700, device=device), torch.randn(33, 700, device=device)
    x[:, ::3] = 0
    x[1:, ::7] = 0
    x, weight = x.to(dtype), weight.to(dtype).mT.contiguous().mT
    options = None, 0, 0.0, None, False
    expected, _ = forward(x, weight, *options)
    weight[:, (x == 0).all(0)] = float("nan")
    out, _ = forward(x, weight, *options)
    assert torch.equal(out, expected)
