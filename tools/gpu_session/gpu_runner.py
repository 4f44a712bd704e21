"""Run the steps of ``gpu.py`` within a time limit, and record their outcomes at once.

A step has its own process group. Processes that it leaves behind are found by a mark in their
environment and killed, also by the next call if this one was killed itself: only one call at a time
may use a folder.
"""

import contextlib
import hashlib
import os
import signal
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gpu_merge import fold, read, write
from gpu_steps import ROOT, Step

#: The seconds of a call that names none.
BUDGET = 470.0
#: The seconds between two archives while a step runs.
EVERY = 30.0
#: The seconds between SIGINT and SIGKILL.
GRACE = 10.0
#: The least seconds for which a resumable step is started.
LEAST = 60.0
MARK = "LLMOS_GPU_OUT"
_SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".cu", ".c", ".json"}
_MADE = {"__pycache__", "baselines", "_build_info.json", "_source_info.json"}


def sources_sum(names: Sequence[str], root: Path = ROOT) -> str:
    """Return a hash of the sources in folders and files; it needs no git."""
    total = hashlib.sha256()
    files = [root / name for name in names if (root / name).is_file()]
    for found in (p for name in names for p in (root / name).rglob("*")):
        if found.suffix in _SUFFIXES and found.is_file():
            files.append(found)
    for path in sorted(files):
        name = path.relative_to(root)
        if not _MADE & {*name.parts} and name.parts[:2] != ("llmos_kernels", "pack"):
            total.update(f"{name}\0".encode() + path.read_bytes())
    return total.hexdigest()[:16]


class Runner:
    """The steps' outcomes in ``out``, and the time that this call has left.

    ``save`` is called whenever ``out`` has results that must not be lost.
    """

    def __init__(
        self,
        out: Path,
        budget: float = BUDGET,
        grace: float = GRACE,
        save: Callable[[], None] = lambda: None,
    ):
        self.out, self.budget, self.grace, self.save = out, budget, grace, save
        self.end = time.monotonic() + budget
        out.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict] = read(out / "summary.json")
        self.sums: dict[tuple, str] = {}

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def sources(self, step: Step) -> str:
        key = tuple(step.folders)
        if key not in self.sums:
            self.sums[key] = sources_sum(key)
        return self.sums[key]

    def outcome(self, step: Step) -> str:
        """Return the outcome of a step: passed, failed, partial, running or new.

        Running means that the call was killed; new, that the step has not run with these sources.
        """
        row = self.rows.get(step.name)
        if not row or row["sources"] != self.sources(step):
            return "new"
        if row["outcome"] == "passed" and step.product and not step.product.exists():
            return "new"
        return row["outcome"]

    def needs(self, step: Step) -> float:
        """Return an estimate of the seconds until a step has passed."""
        row = self.rows.get(step.name, {})
        if self.outcome(step) == "partial":
            return max(step.seconds - row["seconds"], LEAST)
        return step.seconds

    def fits(self, step: Step, first: bool) -> bool:
        """Return True if a step may start now; the first of a call always may."""
        least = min(step.seconds, LEAST) if step.goes_on else step.seconds
        return self.left > self.grace and (first or self.left >= least + self.grace)

    def run(self, step: Step, again: bool = False) -> str:
        """Run a step, and return its outcome."""
        if again or self.outcome(step) == "new":
            for name in step.keeps:
                (self.out / name).unlink(missing_ok=True)
        limit = self.left - self.grace
        if not step.goes_on:
            limit = min(limit, max(2.0 * step.seconds, 60.0))
        stop_marked(self.out)
        row = {"sources": self.sources(step), "estimate": step.seconds, "started": time.time()}
        self._record(step, row | {"outcome": "running"})
        print(f"== {step.name} (at most {limit:.0f} s)", flush=True)
        began = time.monotonic()
        rc, output = call(step, self.out, limit, self.grace, self.save)
        print(output[-3000:], flush=True)
        outcome = "passed" if rc == 0 else "failed"
        if rc == "time limit" and step.goes_on:
            outcome = "partial"
        self._collect(step)
        if outcome == "passed" and step.resume:
            (self.out / step.resume).unlink(missing_ok=True)
        row |= {"outcome": outcome, "rc": rc, "seconds": round(time.monotonic() - began, 1)}
        self._record(step, row | {"tail": output[-6000:]})
        return outcome

    def _record(self, step: Step, row: dict) -> None:
        self.rows[step.name] = row
        write(self.out / "summary.json", self.rows)
        self.save()

    def _collect(self, step: Step) -> None:
        """Add what the step wrote to the results of other steps and of its earlier runs."""
        xml, new = self.out / f"{step.name}.xml", self.out / f"{step.name}.new.json"
        if xml.exists():
            with contextlib.suppress(ET.ParseError):  # It was killed while it wrote.
                tests = read(self.out / "tests.json")
                write(self.out / "tests.json", tests | {step.name: from_junit(xml)})
            xml.unlink()
        if new.exists():
            target = self.out / f"{step.name}.json"
            merged = fold(read(target), read(new))
            if merged:
                write(target, merged)
            new.unlink()


def from_junit(xml: Path) -> dict:
    """Return every test that did not pass, with its message, and the counts."""
    suite = ET.parse(xml).getroot().find("testsuite")
    assert suite is not None, xml
    bad = [
        {
            "test": f"{c.get('classname')}::{c.get('name')}",
            "kind": r.tag,
            "text": (r.text or "")[-4000:],
        }
        for c in suite.iter("testcase")
        for r in c
        if r.tag in ("failure", "error")
    ]
    counts = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    return {**counts, "started": time.time(), "bad": bad}


def wait(process: subprocess.Popen, limit: float, save: Callable[[], None]) -> int:
    """Return a process' exit status; call ``save`` while it runs.

    Raises:
        TimeoutExpired: It still runs at the limit.
    """
    end = time.monotonic() + limit
    while True:
        left = end - time.monotonic()
        try:
            return process.wait(max(min(left, EVERY), 0.0))
        except subprocess.TimeoutExpired:
            if left <= EVERY:
                raise
            save()


def call(
    step: Step, out: Path, limit: float, grace: float, save: Callable[[], None]
) -> tuple[int | str, str]:
    """Return a step's exit status, or "time limit", and its output; end all its processes."""
    runner_env = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", MARK: str(out)}
    env = {**os.environ, **runner_env, **step.env}
    # A shell's background job ignores SIGINT, and a step, which saves its work on it, would too.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A file, because a pipe stays open as long as any process of the step.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [str(part) for part in step.command],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        rc: int | str
        try:
            rc = wait(process, max(limit, 1.0), save)
        except subprocess.TimeoutExpired:
            rc = "time limit"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            stop_marked(out)
        log.seek(0)
        return rc, log.read().decode(errors="replace")


def marked(out: Path) -> Iterator[int]:
    """Yield the processes that steps of ``out`` have started, in whatever session they are."""
    wanted = f"{MARK}={out}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with contextlib.suppress(OSError):
            if pid != os.getpid() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                yield pid


def stop_marked(out: Path) -> None:
    """Kill all processes of steps of ``out``, until no new ones appear or a second has passed."""
    end = time.monotonic() + 1.0
    while (pids := list(marked(out))) and time.monotonic() < end:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
