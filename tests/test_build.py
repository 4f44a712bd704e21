"""What setup.py does where something is missing."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

WITHOUT = """
import importlib.util, os, shutil, sys
missing = sys.argv.pop(1)
find, which = importlib.util.find_spec, shutil.which
importlib.util.find_spec = lambda n, *a: None if n == missing else find(n, *a)
if missing == "compiler":
    shutil.which = lambda n, *a, **k: None if n in ("c++", "g++", "clang++", "") else which(n, *a, **k)
sys.argv[0] = "setup.py"
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__name__": "__main__", "__file__": os.path.abspath("setup.py")})
"""


def setup(missing, *args, **env):
    command = [sys.executable, "-c", WITHOUT, missing, *args]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "missing, named", [("torch", "missing: torch"), ("compiler", "missing: a C++ compiler")]
)
def test_pure_python_wheel(missing, named, tmp_path):
    done = setup(
        missing,
        "-q",
        "egg_info",
        "-e",
        str(tmp_path),
        "bdist_wheel",
        "-b",
        str(tmp_path / "b"),
        "-d",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "pure Python" in line]
    assert len(lines) == 1 and named in lines[0]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "llmos_kernels/py.typed" in names and "llmos_kernels/_triton/layer_norm.py" in names
    assert not any(name.endswith(".so") for name in names)


def test_a_missing_part_can_be_an_error():
    done = setup("torch", "--version", LLMOS_BUILD_EXT="1")
    assert done.returncode and "needs torch" in done.stderr
    done = setup("nothing", "--version", LLMOS_BUILD_EXT="yes")
    assert done.returncode and "'yes'" in done.stderr
