"""Builds of this tree take turns, whatever process asks: they share its folders."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Until its end no other process has one."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / ".turn").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
