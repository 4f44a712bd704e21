"""How busy other processes keep this machine, whose times are worth nothing then."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

#: The number of cores that other processes may keep busy, and the core seconds of theirs that do
#: not count, since the system counts them in ticks of 10 ms.
MAX_CORES, SLACK = 0.15, 0.05
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _all_seconds() -> float:
    """Return the core seconds that the machine has worked since it started."""
    if not Path("/proc/stat").exists():
        return 0.0
    fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICKS  # All but idle and waiting for I/O.


def _seconds_of(pid: int) -> float:
    """Return the core seconds of a process and of its children that have ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    return sum(map(int, text.rpartition(")")[2].split()[11:15])) / _TICKS


class Watch:
    """A watch, from now on, of all processes but those named.

    Args:
        pids: the processes whose work is no disturbance.
    """

    def __init__(self, pids: Sequence[int]):
        self._pids, self._start = pids, time.monotonic()
        self._before = self._others()

    def _others(self) -> float:
        return _all_seconds() - sum(map(_seconds_of, self._pids))

    def others(self) -> float:
        """Return how many cores other processes have kept busy until now."""
        seconds = time.monotonic() - self._start
        return max(0.0, self._others() - self._before - SLACK) / seconds

    def disturbed(self) -> str | None:
        """Return why a measurement since the start was disturbed, or None."""
        share = self.others()
        if share <= MAX_CORES:
            return None
        return f"other processes take {share:.2f} of {os.cpu_count()} cores"
