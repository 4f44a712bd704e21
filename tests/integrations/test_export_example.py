"""The example of a swapped model in a C++ program without Python, and what it needs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.export import export

import llmos_kernels as lk

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "export"


def test_policies_become_kernels():
    """No op that runs in Python is left, and the values stay."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = lk.nn.Linear(8, 16), lk.nn.Linear(16, 8)
            self.int8 = lk.nn.Int8Linear(8, 8)

        def forward(self, x):
            return self.int8(self.down(self.up(x).relu()))

    model, x = Model().eval(), torch.randn(4, 8)
    with torch.no_grad():
        program = export(model, (x,))
        native = program.run_decompositions(lk.native_decompositions())
        torch.testing.assert_close(native.module()(x), model(x))
    names = [str(n.target) for n in native.graph.nodes]
    assert "llmos.linear_forward.default" in names
    assert not any("by_policy" in name or "any_rows" in name for name in names)


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
def test_example(tmp_path):
    """One layer: the whole example takes a minute longer."""

    def run(*command):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    package, build = tmp_path / "package", tmp_path / "build"
    assert "ops of llmos_kernels" in run(sys.executable, EXAMPLE / "package.py", package, "1")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    run("cmake", "-S", EXAMPLE, "-B", build, prefix)
    run("cmake", "--build", build)
    assert "result [3, 384], largest difference to Python" in run(build / "main", package)
