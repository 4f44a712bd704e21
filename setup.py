"""CMakeLists.txt says what to build; this file only calls it.

LLMOS_BUILD_EXT=1 makes a missing torch, pybind11, CMake or compiler an error, 0 builds pure Python.
LLMOS_SANITIZE=1 builds under ASan and UBSan.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# CMake and ninja may come from the environment that runs this file.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
SANITIZE = os.environ.get("LLMOS_SANITIZE") == "1"


def missing() -> list[str]:
    """What the extension needs and this environment lacks."""
    packages = [p for p in ("torch", "pybind11") if not importlib.util.find_spec(p)]
    programs = [p for p in ("cmake", "ninja") if not shutil.which(p)]
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return packages + programs + ["a C++ compiler"] * (not any(map(shutil.which, compilers)))


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        tree = Path(self.build_temp).resolve() / ("sanitize" if SANITIZE else "release")
        # A former environment's generator or paths must not decide this build.
        configure = ["cmake", "-S", ROOT, "-B", tree, "-G", "Ninja", "--fresh"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DLLMOS_SANITIZE={SANITIZE:d}"]
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", tree])
        subprocess.check_call(["cmake", "--install", tree, "--prefix", out])

    def copy_extensions_to_source(self):
        # An editable install: CMake installs straight into the source folder.
        self.inplace = True
        for ext in self.extensions:
            self.build_extension(ext)


def extensions() -> list[Extension]:
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


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
