"""A lock for builds of this source tree, which share its build folder."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Hold the lock; other processes wait until it is released."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / ".turn").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
