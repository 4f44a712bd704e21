"""The pack: Triton kernels that the wheel has compiled, by GPU architecture.

``pack/sm_90.json`` lists variants, ``pack/sm_90.bin`` holds their cubins, each compressed by zlib. A
launch whose arguments have no variant is Triton's to compile. ``LLMOS_PACK=off`` ignores the pack, ``on``
uses it wherever it has an answer, ``require`` raises where it has none, ``auto`` is on for the GPUs where
it is proved.
"""

import functools
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

try:  # What the launcher raises where Triton may still be able to compile.
    from llmos_kernels._C import Unusable
except ImportError:

    class Unusable(RuntimeError):  # type: ignore[no-redef]
        """The pack cannot be used here."""


FORMAT = 1
_PACKAGE = Path(__file__).parents[2]
FOLDER = _PACKAGE / "pack"
#: Architectures where every test has passed on a GPU with LLMOS_PACK=on: there, auto is on.
PROVED: frozenset[str] = frozenset()

#: Triton's names of dtypes.
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
    """``mode``, or ValueError for a name that is none."""
    if mode not in ("off", "auto", "on", "require"):
        raise ValueError(f"LLMOS_PACK must be off, auto, on or require, got {mode!r}")
    return mode


MODE = check_mode(os.environ.get("LLMOS_PACK") or "auto")


class PackError(Unusable):
    """A pack that cannot be used; names the file."""


def sources_sum(folder: Path = _PACKAGE) -> str:
    """A sum of everything that the kernels are made of: a pack of others must not be launched."""
    total = hashlib.sha256()
    for path in sorted([*folder.glob("_triton/**/*.py"), *folder.glob("ops/**/*.py")]):
        name = path.relative_to(folder).as_posix()
        total.update(name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def index_sum(index: dict) -> str:
    """The sum that an index states of the rest of itself."""
    rest = {k: v for k, v in index.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_index(path: Path) -> dict:
    """The index in ``path``, of this format, of these sources, with all of its cubins there.

    Raises PackError for a file that cannot be read, is damaged, or belongs to another build.
    """
    try:
        index = json.loads(path.read_text())
        blob = path.with_suffix(".bin").stat().st_size
    except (OSError, ValueError) as e:
        raise PackError(f"{path}: {e}") from e
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else None
        raise PackError(f"{path}: of format {found!r}, expected {FORMAT}")
    if index.get("sha256") != index_sum(index):
        raise PackError(f"{path}: damaged, its sum is another")
    if index["arch"] != path.stem:
        raise PackError(f"{path}: for {index['arch']}")
    if index["sources"] != sources_sum():
        raise PackError(f"{path}: of other kernel sources than are installed")
    if blob != index["bytes"]:
        raise PackError(f"{path.with_suffix('.bin')}: {blob} bytes, expected {index['bytes']}")
    return index


class Pack:
    """The variants for one architecture."""

    def __init__(self, path: Path):
        self.path = path
        self.index = read_index(path)
        self.kernels: dict = {}

    def kernel(self, name: str, parameters: Sequence[tuple[str, int]], options: Iterable[str]):
        """The ``_C.Kernel`` of all variants of ``name``; without any where the pack has none."""
        from llmos_kernels import _C

        if name not in self.kernels:
            made = _C.Kernel(list(parameters), list(options), DTYPES)
            for v in self.index["kernels"].get(name, ()):
                image = functools.partial(self.cubin, v)
                made.add(v["key"], v["symbol"], 32 * v["warps"], v["shared"], v["parameters"],
                         v["descriptors"], image)  # fmt: skip
            self.kernels[name] = made
        return self.kernels[name]

    def cubin(self, variant: dict) -> bytes:
        """What the driver loads. Raises PackError where it is not what was compiled."""
        path = self.path.with_suffix(".bin")
        try:
            with path.open("rb") as f:
                f.seek(variant["offset"])
                data = zlib.decompress(f.read(variant["length"]))
        except (OSError, zlib.error) as e:
            raise PackError(f"{path}: {e}") from e
        if hashlib.sha256(data).hexdigest() != variant["sha256"]:
            raise PackError(f"{path}: damaged, the sum of {variant['symbol']} is another")
        return data


def archs() -> list[str]:
    """The architectures that this build has kernels for, lowest first."""
    names = (p.stem for p in FOLDER.glob("sm_*.json"))
    return sorted(names, key=lambda name: int(name.removeprefix("sm_")))


def covering(arch: str) -> str | None:
    """The architecture whose kernels run on ``arch``: its own, or of 8.x a lower 8.x.

    From Hopper on kernels use what only their own architecture has.
    """
    having = archs()
    if arch in having:
        return arch
    lower = [a for a in having if a.startswith("sm_8") and len(a) == len(arch) and a < arch]
    return lower[-1] if lower and arch.startswith("sm_8") else None


def arch_of(device: int | torch.device) -> str:
    """The architecture of a GPU, as sm_90."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def opened(arch: str) -> Pack:
    """The pack for ``arch``. Raises PackError where there is none that can be used."""
    try:
        from llmos_kernels import _C  # noqa: F401
    except ImportError as e:
        raise PackError(f"{FOLDER}: cannot be launched without the C++ extension") from e
    name = covering(arch)
    if name is None:
        raise PackError(f"{FOLDER}: no kernels for {arch}, only for {', '.join(archs()) or 'none'}")
    return Pack(FOLDER / f"{name}.json")


def for_device(device: int) -> Pack | None:
    """The pack that a device's launches use; None where they are Triton's.

    Raises PackError if ``LLMOS_PACK=require`` and there is none; else one that is there and cannot
    be used is warned of once.
    """
    arch = arch_of(device)
    if MODE == "require":
        return opened(arch)
    return opened_or_warned(arch) if used_on(arch) else None


@functools.cache
def opened_or_warned(arch: str) -> Pack | None:
    try:
        return opened(arch)
    except PackError as e:
        warn_of_triton(e)
        return None


_warned: list[str] = []


def warn_of_triton(why: Exception) -> None:
    """Say once that the pack cannot be used, and who takes its place."""
    if not _warned:
        _warned.append(str(why))
        warnings.warn(f"{why}; Triton compiles kernels instead", RuntimeWarning, stacklevel=2)


def missing(device: int, kernel: str, key: str | None) -> str:
    """What to say where a pack is required and lacks a launch."""
    return f"LLMOS_PACK=require, and {opened(arch_of(device)).path} has no {kernel} for {key}"


def used_on(arch: str) -> bool:
    """Whether a GPU of ``arch`` uses the pack."""
    wanted = MODE in ("on", "require") or (MODE == "auto" and arch in PROVED)
    return wanted and covering(arch) is not None


def state() -> str:
    """For people: what is inside, and where it is used."""
    having = archs()
    if not having:
        return "none in this build"
    try:
        triton = {read_index(FOLDER / f"{a}.json")["triton"] for a in having}
    except PackError as e:
        return f"cannot be used: {e}"
    used = [a for a in having if used_on(a)]
    return (
        f"{', '.join(having)}, compiled by Triton {', '.join(sorted(triton))};"
        f" LLMOS_PACK={MODE}: {'used on ' + ', '.join(used) if used else 'not used'}"
    )
