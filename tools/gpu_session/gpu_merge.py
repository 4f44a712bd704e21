"""Merge the results of several calls of ``gpu.py``; each JSON file is written in one step."""

import contextlib
import json
from pathlib import Path


def read(path: Path) -> dict:
    """Return the object in ``path``; empty if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, value: object) -> None:
    """Write JSON in one step: an old file stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)


def fold(first: dict, second: dict) -> dict:
    """Return both results of pytest-benchmark as one; the newer of a benchmark that both have."""
    if not first or not second:
        return first or second
    older, newer = sorted((first, second), key=lambda result: result.get("datetime", ""))
    rows = {b["fullname"]: b for r in (older, newer) for b in r.get("benchmarks", ())}
    return {**older, **newer, "benchmarks": [*rows.values()]}


def newest(first: dict, second: dict) -> dict:
    """Return both tables as one; the entry that ``started`` later where both have it."""
    latest = lambda name: max(
        (t[name] for t in (first, second) if name in t), key=lambda row: row.get("started", 0)
    )
    return {name: latest(name) for name in {**first, **second}}


def lines(first: str, second: str) -> str:
    """Return the lines of both, each once."""
    return "".join(f"{line}\n" for line in dict.fromkeys(first.splitlines() + second.splitlines()))


def latest(folder: Path) -> float:
    """Return when the last step of those in ``folder`` started."""
    rows = read(folder / "summary.json").values()
    return max((row.get("started", 0) for row in rows), default=0)


def into(target: Path, folder: Path) -> None:
    """Merge the files of ``folder`` into ``target``; the newer wins."""
    older = latest(folder) < latest(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.json*")):
        merged, found = target / path.name, read(path)
        if path.suffix == ".jsonl":
            there = merged.read_text() if merged.exists() else ""
            merged.write_text(lines(there, path.read_text()))
        elif path.name in ("summary.json", "tests.json"):
            write(merged, newest(read(merged), found))
        elif "benchmarks" in found:
            write(merged, fold(read(merged), found))
        elif not (older and merged.exists()):
            with contextlib.suppress(ValueError):  # It may have been archived while it was written.
                write(merged, json.loads(path.read_text()))


def merge(folder: Path, results: Path) -> Path:
    """Merge the files of ``folder`` into ``results``/<GPU>, and return that folder.

    Raises:
        ValueError: about.json does not name the machine.
    """
    about = read(folder / "about.json")
    if "machine" not in about:
        raise ValueError(f"{folder / 'about.json'} names no machine")
    target = results / about["machine"]
    into(target, folder)
    return target
