"""Read what the build recorded about itself, and compare the installed files with their wheel."""

import base64
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_INFO = Path(__file__).parents[1] / "_build_info.json"


def build_info() -> dict[str, Any]:
    """Return what setup.py recorded about the build; empty if nothing was recorded."""
    try:
        return json.loads(_INFO.read_text())
    except FileNotFoundError:
        return {}


def commit() -> str:
    """Return a phrase that names the commit that was built, such as "of commit 0123456789ab"."""
    info = build_info()
    if not info.get("commit"):
        return "of an unknown commit"
    return f"of commit {info['commit'][:12]}{' with changes' if info['dirty'] else ''}"


def altered() -> Iterator[str]:
    """Yield a line for each file that is missing or differs from its checksum in RECORD.

    Raises:
        ValueError: The package was not installed from a wheel.
    """
    try:
        files = importlib.metadata.distribution("llmos_kernels").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    # Bytecode is compiled after the wheel was built and has no checksum.
    listed = [(f, f.hash) for f in files if f.parts[0] == "llmos_kernels" and f.hash]
    if not listed:
        raise ValueError("no checksums to compare with: llmos_kernels runs from its sources")
    for f, expected in listed:
        path = Path(str(f.locate()))
        try:
            digest = hashlib.new(expected.mode, path.read_bytes()).digest()
        except OSError as e:
            yield f"{path}: {e.strerror}"
            continue
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != expected.value:
            yield f"{path}: its {expected.mode} differs"
