"""Builds by setup.py: with missing parts, sdists, the pack, the bill of materials."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
from one_tree import ROOT, turn

from llmos_kernels._tools.build_pack import MODULES

WITHOUT = """
import importlib.util, os, shutil, sys
missing = sys.argv.pop(1)
find, which = importlib.util.find_spec, shutil.which
importlib.util.find_spec = lambda n, *a: None if n == missing else find(n, *a)
if missing == "compiler":
    hidden = ("c++", "g++", "clang++", "")
    shutil.which = lambda n, *a, **k: None if n in hidden else which(n, *a, **k)
sys.argv[0] = "setup.py"
names = {"__name__": "__main__", "__file__": os.path.abspath("setup.py")}
exec(compile(open("setup.py").read(), "setup.py", "exec"), names)
"""


def setup(missing, *args, **env):
    command = [sys.executable, "-c", WITHOUT, missing, *args]
    with turn():
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True
        )


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
        "build",
        "-b",
        str(tmp_path / "build"),
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
    assert "llmos_kernels/py.typed" in names and "llmos_kernels/_triton/norm/layer_norm.py" in names
    assert not any(name.endswith(".so") for name in names)
    assert "llmos_kernels/tuned/cpu/products.json" in names
    tops = {name.partition("/")[0] for name in names}
    assert all(t == "llmos_kernels" or t.endswith(".dist-info") for t in tops), tops
    assert [name for name in names if "bench" in name] == ["llmos_kernels/_tools/bench.py"]
    read = lambda name: json.loads(zipfile.ZipFile(wheel).read(name))
    assert read("llmos_kernels/_build_info.json").keys() == {"commit", "dirty", "python"}
    (bom,) = (name for name in names if ".dist-info/sboms/" in name)
    assert read(bom)["bomFormat"] == "CycloneDX"
    assert read(bom)["metadata"]["component"]["name"] == "llmos_kernels"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Return the folder of an unpacked sdist of this tree."""
    folder = tmp_path_factory.mktemp("sdist")
    done = setup("nothing", "-q", "egg_info", "-e", str(folder), "sdist", "-d", str(folder))
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as t:
        t.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_sdist(sdist):
    """An sdist has every file that a build needs, and its commit."""
    listed = subprocess.run(
        [
            "git",
            "ls-files",
            "llmos_kernels",
            "csrc",
            "CMakeLists.txt",
            "setup.py",
            "pyproject.toml",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    missing = [name for name in listed if not (sdist / name).exists()]
    assert len(listed) > 100 and not missing, missing
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert json.loads((sdist / "_source_info.json").read_text())["commit"] == head


def test_installed_files(sdist, tmp_path):
    """``verify --files`` passes for an installed wheel, and finds a changed file."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLMOS", "PYTHON"))}
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-deps"]
    target = tmp_path / "site"
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", target, sdist],
        env=env | {"LLMOS_BUILD_EXT": "0"},
        check=True,
    )

    def verify():
        return subprocess.run(
            [sys.executable, "-P", "-m", "llmos_kernels", "verify", "--files"],
            env=env | {"PYTHONPATH": str(target)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    about = json.loads((target / "llmos_kernels" / "_build_info.json").read_text())
    assert len(about["commit"]) == 40
    done = verify()
    assert done.returncode == 0 and done.stdout == "PASS\n", done.stderr
    (target / "llmos_kernels" / "py.typed").write_text("changed")
    (target / "llmos_kernels" / "_tools/checksums.py").touch()
    done = verify()
    assert done.returncode == 1 and "py.typed: its sha256 differs" in done.stdout
    assert "1 files altered: FAIL" in done.stdout


def evaluated(expression, **env):
    """Evaluate ``expression`` with the names of setup.py and print it, in another process."""
    code = f"""
import runpy, sys
sys.argv = ["setup.py", "--version"]
print(eval({expression!r}, runpy.run_path("setup.py", run_name="__main__")))
"""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True
    )


def test_jobs():
    """``jobs`` returns MAX_JOBS, or what cores and memory allow."""
    assert evaluated("jobs()", MAX_JOBS="7").stdout.split()[-1] == "7"
    assert 1 <= int(evaluated("jobs()", MAX_JOBS="").stdout.split()[-1]) <= (os.cpu_count() or 1)
    done = evaluated("jobs()", MAX_JOBS="many")
    assert done.returncode and "'many'" in done.stderr


def test_the_pack_is_built_where_it_is_asked_for():
    def packed(**env):
        return evaluated("repr(pack_modules())", **{"TORCH_CUDA_ARCH_LIST": "9.0", **env})

    for wanted, found in (
        ("", "''"),
        ("0", "''"),
        ("1", "'ALL'"),
        ("gemm.linear,int8.linear", "'gemm.linear;int8.linear'"),
    ):
        assert packed(LLMOS_BUILD_PACK=wanted).stdout.split()[-1] == found
    assert packed(LLMOS_BUILD_PACK=" ".join(MODULES)).returncode == 0
    for wrong in ("nonsense", "gemm.linear nonsense", "gemm.gemm"):
        done = packed(LLMOS_BUILD_PACK=wrong)
        assert done.returncode and f"got '{wrong.split()[-1]}'" in done.stderr
    done = packed(LLMOS_BUILD_PACK="1", TORCH_CUDA_ARCH_LIST="")
    assert done.returncode and "needs TORCH_CUDA_ARCH_LIST" in done.stderr


def test_a_wheel_says_how_far_it_is(capsys):
    """Of the output of pip and CMake only the lines of the pack, and ours, are shown."""
    spec = importlib.util.spec_from_file_location("wheel_script", ROOT / "tools" / "wheel.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    said = [
        "  pack: 9 of 90 kernels for sm_90, 1.0 minutes to go",
        "noise",
        "llmos_kernels: no CUDA",
    ]
    script.show(said_lines := [f"{line}\n" for line in said], kept := [])
    assert capsys.readouterr().out.splitlines() == [said[0].strip(), said[2]]
    assert kept == said_lines


def test_bill_of_materials():
    about = {"commit": "c", "dirty": False, "python": "3.11", "torch": "2.13.0", "nvcc": "13.0.88"}
    call = f"bill_of_materials({about}, '1.0')"
    done = [evaluated(call, SOURCE_DATE_EPOCH="1700000000") for _ in range(2)]
    assert done[0].returncode == 0, done[0].stderr
    assert done[0].stdout == done[1].stdout
    bom = json.loads(done[0].stdout.partition("\n")[2])  # The first line is that of --version.
    parts = {c["name"]: c["version"] for c in bom["components"]}
    assert parts.items() >= {"torch": "2.13.0", "cuda-cudart": "13.0.88"}.items()
    assert "pybind11" in parts and bom["metadata"]["timestamp"].startswith("2023-11-14")


def test_a_missing_part_can_be_an_error():
    done = setup("torch", "--version", LLMOS_BUILD_EXT="1")
    assert done.returncode and "needs torch" in done.stderr
    done = setup("nothing", "--version", LLMOS_BUILD_EXT="yes")
    assert done.returncode and "'yes'" in done.stderr
