"""Importing the package is cheap, has no side effects and survives a fork."""

import os
import subprocess
import sys

import pytest

LAZY = """
import sys, torch, llmos_kernels as lk
lk.layer_norm(torch.ones(2, 4), (4,))
lk.optimize(torch.nn.LayerNorm(4))
assert "triton" not in sys.modules, "Triton was imported"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
"""

FORK = """
import os, torch, llmos_kernels as lk
x = torch.randn(512, 768)
expected = lk.layer_norm(x, (768,))
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)  # Threads of OpenMP do not survive a fork.
    os._exit(not torch.equal(lk.layer_norm(x, (768,)), expected))
assert os.waitpid(pid, 0)[1] == 0
"""

FORK_BEFORE_USE = """
import os, torch, llmos_kernels as lk
pid = os.fork()
y = lk.layer_norm(torch.arange(8.).repeat(4096, 96), (768,))
if pid == 0:
    os._exit(not y.isfinite().all())
assert os.waitpid(pid, 0)[1] == 0
"""

FALLBACK = """
from importlib.machinery import PathFinder
real = PathFinder.find_spec
missing = "llmos_kernels._C"
PathFinder.find_spec = lambda name, *a, **k: None if name == missing else real(name, *a, **k)
import torch, llmos_kernels as lk
from llmos_kernels._tools import environment
x = torch.randn(5, 33, requires_grad=True)
y, h = lk.add_layer_norm(x, x, (33,), dropout_p=0.5, training=True)
(y.sum() + h.sum()).backward()
assert environment.owner("llmos::layer_norm_forward", "CPU") == "reference"
assert "not built" in list(environment.describe())[-1]
"""

BROKEN = """
import torch
torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError(f"cannot load {path}"))
import llmos_kernels
"""


def fresh(code, **env):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLMOS", "TRITON"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | env, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "code",
    [LAZY, FORK, FORK_BEFORE_USE, FALLBACK],
    ids=["lazy", "fork", "fork_before_use", "fallback"],
)
def test_fresh_process(code):
    done = fresh(code)
    assert done.returncode == 0, done.stderr


def test_a_broken_build_raises():
    done = fresh(BROKEN)
    assert done.returncode and "cannot load" in done.stderr


@pytest.mark.parametrize("name, value", [("LLMOS_CPU_LEVEL", "sse9"), ("LLMOS_BACKEND", "magic")])
def test_unknown_settings_raise(name, value):
    done = fresh("import llmos_kernels", **{name: value})
    assert done.returncode and f"ValueError: {name}" in done.stderr and value in done.stderr


def test_the_forced_reference():
    code = "from llmos_kernels._tools import environment as e; print(*e.describe(), sep='\\n')"
    done = fresh(code, LLMOS_BACKEND="reference")
    assert "csrc/" not in done.stdout and "LLMOS_BACKEND=reference" in done.stdout.splitlines()[-1]
