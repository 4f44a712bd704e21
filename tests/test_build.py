"""What setup.py does where something is missing."""

import json
import os
import subprocess
import sys
import tarfile
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
    read = lambda name: json.loads(zipfile.ZipFile(wheel).read(name))
    assert read("llmos_kernels/_build_info.json").keys() == {"commit", "dirty", "python"}
    (bom,) = (name for name in names if ".dist-info/sboms/" in name)
    assert read(bom)["bomFormat"] == "CycloneDX"
    assert read(bom)["metadata"]["component"]["name"] == "llmos_kernels"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The folder that an sdist of this tree unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    done = setup("nothing", "-q", "egg_info", "-e", str(folder), "sdist", "-d", str(folder))
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as t:
        t.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_sdist(sdist):
    """It has all that a build needs, and knows its commit."""
    listed = subprocess.run(
        ["git", "ls-files", "llmos_kernels", "csrc", "CMakeLists.txt", "setup.py", "pyproject.toml"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    missing = [name for name in listed if not (sdist / name).exists()]
    assert len(listed) > 100 and not missing, missing
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert json.loads((sdist / "_source_info.json").read_text())["commit"] == head


def test_installed_files(sdist, tmp_path):
    """A pure wheel of the sdist, installed: its files are checked, and one that was changed is found."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLMOS", "PYTHON"))}
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-deps"]
    target = tmp_path / "site"
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", target, sdist],
        env=env | {"LLMOS_BUILD_EXT": "0"}, check=True,
    )  # fmt: skip

    def verify():
        return subprocess.run(
            [sys.executable, "-P", "-m", "llmos_kernels", "verify", "--files"],
            env=env | {"PYTHONPATH": str(target)}, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip

    about = json.loads((target / "llmos_kernels" / "_build_info.json").read_text())
    assert len(about["commit"]) == 40
    done = verify()
    assert done.returncode == 0 and done.stdout == "PASS\n", done.stderr
    (target / "llmos_kernels" / "py.typed").write_text("changed")
    (target / "llmos_kernels" / "_files.py").touch()
    done = verify()
    assert done.returncode == 1 and "py.typed: its sha256 is another" in done.stdout
    assert "1 files altered: FAIL" in done.stdout


def test_jobs():
    """As memory allows, or as MAX_JOBS says."""
    code = "import runpy; m = runpy.run_path('setup.py', run_name='__main__'); print(m['jobs']())"
    run = lambda **env: subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['setup.py', '--version']; {code}"],
        cwd=ROOT, env=os.environ | env, capture_output=True, text=True,
    )  # fmt: skip
    assert run(MAX_JOBS="7").stdout.split()[-1] == "7"
    assert 1 <= int(run(MAX_JOBS="").stdout.split()[-1]) <= (os.cpu_count() or 1)
    done = run(MAX_JOBS="many")
    assert done.returncode and "'many'" in done.stderr


def test_a_missing_part_can_be_an_error():
    done = setup("torch", "--version", LLMOS_BUILD_EXT="1")
    assert done.returncode and "needs torch" in done.stderr
    done = setup("nothing", "--version", LLMOS_BUILD_EXT="yes")
    assert done.returncode and "'yes'" in done.stderr
