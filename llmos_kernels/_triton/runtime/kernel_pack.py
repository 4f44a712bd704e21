"""The pack: Triton kernels that are compiled ahead of time and shipped in the wheel.

There is one pack for each architecture: ``pack/sm_90.json`` is the index of the variants for sm_90,
and ``pack/sm_90.bin`` holds their cubins, each compressed with zlib. Triton compiles a launch whose
variant the pack does not hold. ``LLMOS_PACK`` is one of

- ``off``: do not use the pack;
- ``on``: use it for every variant that it holds;
- ``require``: raise an error for a variant that it does not hold;
- ``auto``, the default: ``on`` for the architectures in ``PROVED``, else ``off``.
"""

import functools
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

try:  # The C++ launcher raises this error if Triton may still be able to compile the kernel.
    from llmos_kernels._C import Unusable
except ImportError:

    class Unusable(RuntimeError):  # type: ignore[no-redef]
        """The pack cannot be used on this machine."""


FORMAT = 1
_PACKAGE = Path(__file__).parents[2]
FOLDER = _PACKAGE / "pack"
#: Architectures whose GPUs have passed every test with LLMOS_PACK=on: ``auto`` uses the pack there.
PROVED: frozenset[str] = frozenset()

#: Triton's name of each dtype.
DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def check_mode(mode: str) -> str:
    """Return ``mode``; raise ValueError if it is no value of ``LLMOS_PACK``."""
    if mode not in ("off", "auto", "on", "require"):
        raise ValueError(f"LLMOS_PACK must be off, auto, on or require, got {mode!r}")
    return mode


MODE = check_mode(os.environ.get("LLMOS_PACK") or "auto")


class PackError(Unusable):
    """A pack cannot be used; the message names its file."""


def sources_sum(folder: Path = _PACKAGE) -> str:
    """Return a hash of all sources of the kernels: a pack with another hash must not be used."""
    total = hashlib.sha256()
    for path in sorted([*folder.glob("_triton/**/*.py"), *folder.glob("ops/**/*.py")]):
        name = path.relative_to(folder).as_posix()
        total.update(name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def index_sum(index: dict) -> str:
    """Return the hash of ``index`` without its own entry ``sha256``, which holds this hash."""
    rest = {k: v for k, v in index.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_index(path: Path) -> dict:
    """Return the index in ``path``, after checking it and the size of the file of its cubins.

    Raises:
        PackError: A file cannot be read, is damaged, or belongs to other sources or another format.
    """
    try:
        index = json.loads(path.read_text())
        blob = path.with_suffix(".bin").stat().st_size
    except (OSError, ValueError) as e:
        raise PackError(f"{path}: {e}") from e
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else None
        raise PackError(f"{path}: has format {found!r}, expected {FORMAT}")
    if index.get("sha256") != index_sum(index):
        raise PackError(f"{path}: damaged, its hash does not match")
    if index["arch"] != path.stem:
        raise PackError(f"{path}: holds kernels for {index['arch']}")
    if index["sources"] != sources_sum():
        raise PackError(f"{path}: was built from other kernel sources than are installed")
    if blob != index["bytes"]:
        raise PackError(f"{path.with_suffix('.bin')}: {blob} bytes, expected {index['bytes']}")
    return index


class Pack:
    """The compiled variants of all kernels for one architecture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = read_index(path)
        self.kernels: dict = {}

    def kernel(
        self, name: str, parameters: Sequence[tuple[str, int]], options: Iterable[str]
    ) -> Any:
        """Return the ``_C.PackedKernel`` with all variants of ``name``, which may be none."""
        from llmos_kernels import _C

        if name not in self.kernels:
            made = _C.PackedKernel(list(parameters), list(options), DTYPES)
            for v in self.index["kernels"].get(name, ()):
                image = functools.partial(self.cubin, v)
                threads, maps = 32 * v["warps"], v["descriptors"]
                made.add(v["key"], v["symbol"], threads, v["shared"], v["parameters"], maps, image)
            self.kernels[name] = made
        return self.kernels[name]

    def cubin(self, variant: dict) -> bytes:
        """Return the cubin of a variant; raise PackError if it is damaged."""
        path = self.path.with_suffix(".bin")
        try:
            with path.open("rb") as f:
                f.seek(variant["offset"])
                data = zlib.decompress(f.read(variant["length"]))
        except (OSError, zlib.error) as e:
            raise PackError(f"{path}: {e}") from e
        if hashlib.sha256(data).hexdigest() != variant["sha256"]:
            raise PackError(f"{path}: damaged, the hash of {variant['symbol']} does not match")
        return data


def archs() -> list[str]:
    """Return the architectures that the pack of this build covers, lowest first."""
    names = (p.stem for p in FOLDER.glob("sm_*.json"))
    return sorted(names, key=lambda name: int(name.removeprefix("sm_")))


def covering(arch: str) -> str | None:
    """Return the architecture of the pack whose kernels run on ``arch``, or None.

    It is ``arch`` itself or, for 8.x, the highest 8.y below it. From Hopper (9.0) on kernels use
    instructions that only their own architecture has.
    """
    available = archs()
    if arch in available:
        return arch
    lower = [a for a in available if a.startswith("sm_8") and len(a) == len(arch) and a < arch]
    return lower[-1] if lower and arch.startswith("sm_8") else None


def arch_of(device: int | torch.device) -> str:
    """Return the architecture of a GPU, such as ``sm_90``."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def opened(arch: str) -> Pack:
    """Return the pack for ``arch``; raise PackError if there is none or it cannot be used."""
    try:
        from llmos_kernels import _C  # noqa: F401
    except ImportError as e:
        raise PackError(f"{FOLDER}: cannot be launched without the C++ extension") from e
    name = covering(arch)
    if name is None:
        raise PackError(f"{FOLDER}: no kernels for {arch}, only for {', '.join(archs()) or 'none'}")
    return Pack(FOLDER / f"{name}.json")


def for_device(device: int) -> Pack | None:
    """Return the pack that launches on ``device`` use, or None if Triton compiles all of them.

    A pack that exists and cannot be used causes one warning.

    Raises:
        PackError: ``LLMOS_PACK=require`` and there is no usable pack for the device.
    """
    arch = arch_of(device)
    if MODE == "require":
        return opened(arch)
    return opened_or_warned(arch) if used_on(arch) else None


@functools.cache
def opened_or_warned(arch: str) -> Pack | None:
    """Return the pack for ``arch``; if it cannot be used, warn and return None."""
    try:
        return opened(arch)
    except PackError as e:
        warn_of_triton(e)
        return None


_warned: list[str] = []


def warn_of_triton(why: Exception) -> None:
    """Warn, once in a process, that Triton compiles kernels because the pack cannot be used."""
    if not _warned:
        _warned.append(str(why))
        warnings.warn(f"{why}; Triton compiles kernels instead", RuntimeWarning, stacklevel=2)


def missing(device: int, kernel: str, key: str | None) -> str:
    """Return the error message for a launch that a required pack does not hold."""
    return f"LLMOS_PACK=require, and {opened(arch_of(device)).path} has no {kernel} for {key}"


def used_on(arch: str) -> bool:
    """Return True if GPUs of ``arch`` use the pack, in this mode and with this build."""
    wanted = MODE in ("on", "require") or (MODE == "auto" and arch in PROVED)
    return wanted and covering(arch) is not None


def state() -> str:
    """Return a description for users: the architectures in the pack, and which of them use it."""
    available = archs()
    if not available:
        return "none in this build"
    try:
        triton = {read_index(FOLDER / f"{a}.json")["triton"] for a in available}
    except PackError as e:
        return f"cannot be used: {e}"
    used = [a for a in available if used_on(a)]
    return (
        f"{', '.join(available)}, compiled by Triton {', '.join(sorted(triton))};"
        f" LLMOS_PACK={MODE}: {'used on ' + ', '.join(used) if used else 'not used'}"
    )
