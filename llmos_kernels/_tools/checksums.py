"""What was installed: the build's own account of itself, and whether its files are still those."""

import base64
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

_INFO = Path(__file__).parents[1] / "_build_info.json"


def build_info() -> dict:
    """What setup.py wrote of the build; empty where there was none."""
    try:
        return json.loads(_INFO.read_text())
    except FileNotFoundError:
        return {}


def commit() -> str:
    """The commit that was built, for people."""
    info = build_info()
    if not info.get("commit"):
        return "of an unknown commit"
    return f"of commit {info['commit'][:12]}{' with changes' if info['dirty'] else ''}"


def altered() -> Iterator[str]:
    """Each file that is missing or has other bytes than its wheel had: by the sums in RECORD.

    Raises ValueError where no wheel was installed.
    """
    try:
        files = importlib.metadata.distribution("llmos_kernels").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    # Bytecode, made after the wheel, has no sum.
    own = [(f, f.hash) for f in files if f.parts[0] == "llmos_kernels" and f.hash]
    if not own:
        raise ValueError("no sums to compare with: llmos_kernels runs from its sources")
    for f, wanted in own:
        path = Path(str(f.locate()))
        try:
            digest = hashlib.new(wanted.mode, path.read_bytes()).digest()
        except OSError as e:
            yield f"{path}: {e.strerror}"
            continue
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != wanted.value:
            yield f"{path}: its {wanted.mode} is another"
