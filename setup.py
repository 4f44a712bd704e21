"""Build the package: call CMake for the C++ extension, and write what ``env`` shows of the build.

Environment variables:
    LLMOS_BUILD_EXT: 1 makes a missing torch, pybind11, CMake or compiler an error; 0 builds pure
        Python. By default the extension is built if nothing is missing.
    LLMOS_BUILD_PACK: 1 compiles Triton kernels ahead of time into the wheel, a list of modules of
        ``_triton`` only theirs. By default, and with 0, none are compiled.
    TORCH_CUDA_ARCH_LIST: The GPUs that CUDA C++ and the pack are compiled for, such as "8.0;9.0".
        By default CUDA C++ is compiled for the GPUs of this machine, if any.
    LLMOS_SANITIZE: 1 builds with AddressSanitizer and UndefinedBehaviorSanitizer.
    LLMOS_EMULATE: 1 adds the CUDA kernels as C++ for the CPU, which tests run.
    MAX_JOBS: The number of parallel compilers.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import uuid
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
# CMake and ninja may be installed in the Python environment that runs this file.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
SANITIZE = os.environ.get("LLMOS_SANITIZE") == "1"
#: The file in the package that describes the build.
BUILD_INFO = "_build_info.json"
#: The file in an sdist that has what git knows of the sources.
SOURCE_INFO = "_source_info.json"
#: Approximate memory of gcc for the largest source file.
GIB_PER_JOB = 1.5


def source_info() -> dict[str, Any]:
    """Return the commit of the sources and whether they differ from it, or None for unknown."""
    if (ROOT / ".git").exists() and shutil.which("git"):

        def git(*args: str) -> str:
            command = ["git", "-C", str(ROOT), *args]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()

        try:
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
        except subprocess.CalledProcessError:  # Another user's repository, or no commit yet.
            pass
    recorded = ROOT / SOURCE_INFO
    if recorded.exists():
        return json.loads(recorded.read_text())
    return {"commit": None, "dirty": None}


def write_info(folder: Path, **built: Any) -> None:
    """Write the description of the build to ``folder``, the package."""
    about = source_info() | {"python": sysconfig.get_python_version()} | built
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BUILD_INFO).write_text(json.dumps(about, indent=1) + "\n")


def jobs() -> int:
    """Return the number of parallel compilers: MAX_JOBS, or as cores and memory allow."""
    wanted = os.environ.get("MAX_JOBS", "")
    if wanted:
        if not wanted.isdigit() or int(wanted) < 1:
            raise SystemExit(f"MAX_JOBS must be a whole number of 1 or more, got {wanted!r}")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:  # MemAvailable also counts the memory of caches, which can be reclaimed.
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(s.split()[1]) << 10 for s in lines if s.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    return max(1, min(cores or 1, int(free / GIB_PER_JOB / 2**30)))


def missing() -> list[str]:
    """Return the names of what the extension needs and this environment does not have."""
    packages = [p for p in ("torch", "pybind11") if not importlib.util.find_spec(p)]
    programs = [p for p in ("cmake", "ninja") if not shutil.which(p)]
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return packages + programs + ["a C++ compiler"] * (not any(map(shutil.which, compilers)))


def pack_modules() -> str:
    """Return the modules whose kernels CMake compiles into the pack: "", "ALL" or a list."""
    wanted = os.environ.get("LLMOS_BUILD_PACK", "")
    if wanted in ("", "0") or SANITIZE:
        return ""
    folder = ROOT / "llmos_kernels" / "_triton"
    files = [f for f in folder.glob("**/*.py") if "\ndef variants(" in f.read_text()]
    known = {".".join(f.relative_to(folder).with_suffix("").parts) for f in files}
    modules = wanted.replace(",", " ").split()
    if wanted != "1" and (unknown := [name for name in modules if name not in known]):
        raise SystemExit(
            f"LLMOS_BUILD_PACK must be 0, 1 or modules of {', '.join(sorted(known))};"
            f" got {' '.join(unknown)!r}"
        )
    if not importlib.util.find_spec("triton"):
        raise SystemExit(f"llmos_kernels: LLMOS_BUILD_PACK={wanted} needs triton")
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        raise SystemExit(
            f"llmos_kernels: LLMOS_BUILD_PACK={wanted} needs TORCH_CUDA_ARCH_LIST, the GPUs to"
            " compile for, such as '8.0;9.0'"
        )
    return "ALL" if wanted == "1" else ";".join(modules)


class CMakeBuild(build_ext):
    """Build the extension by CMake."""

    def run(self) -> None:
        if self.inplace or self.editable_mode:
            self.copy_extensions_to_source()
        else:
            super().run()

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Wheels and editable installs share a build tree, and so their object files.
        about = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        tree = ROOT.resolve() / "build" / about / ("sanitize" if SANITIZE else "release")
        # Compilers and paths of an earlier environment must not be used; its object files may be.
        (tree / "CMakeCache.txt").unlink(missing_ok=True)
        for found in (tree / "CMakeFiles").glob("[0-9]*"):
            shutil.rmtree(found)
        configure = ["cmake", "-S", ROOT, "-B", tree, "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DLLMOS_SANITIZE={SANITIZE:d}"]
        configure += [f"-DLLMOS_EMULATE={os.environ.get('LLMOS_EMULATE') == '1':d}"]
        modules = "" if self.inplace else pack_modules()
        configure += [f"-DLLMOS_PACK={modules}", f"-DLLMOS_JOBS={jobs()}"]
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", tree, "--parallel", str(jobs())])
        subprocess.check_call(["cmake", "--install", tree, "--prefix", out])
        write_info(out, **json.loads((tree / "built.json").read_text()))

    def copy_extensions_to_source(self) -> None:
        # An editable install: CMake installs directly into the source folder.
        self.inplace = True
        for ext in self.extensions:
            self.build_extension(ext)


class PurePython(build_py):
    """Copy the Python files and describe the build."""

    def run(self) -> None:
        if not self.editable_mode:  # Copies of deleted sources must not get into a wheel.
            shutil.rmtree(Path(self.build_lib) / "llmos_kernels", ignore_errors=True)
        super().run()
        if not self.editable_mode:
            write_info(Path(self.build_lib) / "llmos_kernels")


class SourceDistribution(sdist):
    """Record the commit in the sdist, which has no git repository."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, SOURCE_INFO).write_text(json.dumps(source_info()) + "\n")


def bill_of_materials(about: dict[str, Any], version: str) -> str:
    """Return a CycloneDX JSON document of the components of a wheel.

    ``about`` is the description of the build, ``version`` that of the package.
    """
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    license_of = LicenseFactory().make_from_string

    def part(name: str, version: str, expression: str, kind: str = "pypi") -> Component:
        url = PackageURL(kind, None, name.replace("_", "-"), version)
        return Component(
            name=name,
            version=version,
            type=ComponentType.LIBRARY,
            purl=url,
            bom_ref=str(url),
            licenses=[license_of(expression)],
        )

    bom, package = Bom(), part("llmos_kernels", version, "Apache-2.0")
    parts = []
    if about.get("torch"):  # The headers of torch and of pybind11 are compiled in.
        parts += [part("torch", about["torch"], "BSD-3-Clause")]
        parts += [part("pybind11", importlib.metadata.version("pybind11"), "BSD-3-Clause")]
    if about.get("triton"):
        parts += [part("triton", about["triton"], "MIT")]
    if about.get("nvcc"):  # cudart is linked statically.
        parts += [part("cuda-cudart", about["nvcc"], "NVIDIA CUDA Toolkit EULA", "generic")]
    bom.metadata.component = package
    for component in parts:
        bom.components.add(component)
    bom.register_dependency(package, parts)
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    bom.metadata.timestamp = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([version, about], sort_keys=True))
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


class Wheel(bdist_wheel):
    """Put a bill of materials into the wheel, if cyclonedx-python-lib is installed."""

    def write_wheelfile(self, wheelfile_base: str, *args: Any, **kwargs: Any) -> None:
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        base = Path(wheelfile_base)
        info = base.parent / "llmos_kernels" / BUILD_INFO
        if not info.exists():  # The wheel of an editable install does not contain the package.
            return
        if not importlib.util.find_spec("cyclonedx"):
            print(
                "llmos_kernels: no bill of materials in the wheel (missing: cyclonedx-python-lib)"
            )
            return
        folder = base / "sboms"
        folder.mkdir(exist_ok=True)
        bom = bill_of_materials(json.loads(info.read_text()), self.distribution.get_version())
        (folder / "llmos_kernels.cdx.json").write_text(bom)


def extensions() -> list[Extension]:
    """Return the extension to build, or nothing for pure Python."""
    wanted = os.environ.get("LLMOS_BUILD_EXT", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"LLMOS_BUILD_EXT must be 0 or 1, got {wanted!r}")
    lacking = missing()
    if wanted == "1" and lacking:
        raise SystemExit(f"llmos_kernels: the extension needs {', '.join(lacking)}")
    if wanted == "0" or lacking:
        why = "LLMOS_BUILD_EXT=0" if wanted == "0" else f"missing: {', '.join(lacking)}"
        print(f"llmos_kernels: building pure Python, without the C++ kernels ({why})")
        return []
    return [Extension("llmos_kernels._C", sources=[])]


setup(
    ext_modules=extensions(),
    cmdclass={
        "bdist_wheel": Wheel,
        "build_ext": CMakeBuild,
        "build_py": PurePython,
        "sdist": SourceDistribution,
    },
)
