"""Outcomes of several calls of ``gpu.py`` become one: JSON files that are written in one step."""

import contextlib
import json
from pathlib import Path


def read(path: Path) -> dict:
    """The object in ``path``; empty where there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, value: object) -> None:
    """In one step: whoever is killed leaves what there was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)


def fold(one: dict, other: dict) -> dict:
    """Both results of pytest-benchmark: of a benchmark that both have, the newer."""
    if not one or not other:
        return one or other
    older, newer = sorted((one, other), key=lambda result: result.get("datetime", ""))
    rows = {b["fullname"]: b for r in (older, newer) for b in r.get("benchmarks", ())}
    return {**older, **newer, "benchmarks": [*rows.values()]}


def newest(one: dict, other: dict) -> dict:
    """Both tables of what has ``started``: of an entry that both have, the newer."""
    latest = lambda name: max(
        (t[name] for t in (one, other) if name in t), key=lambda row: row.get("started", 0)
    )
    return {name: latest(name) for name in {**one, **other}}


def lines(one: str, other: str) -> str:
    """The lines of both, each once."""
    return "".join(f"{line}\n" for line in dict.fromkeys(one.splitlines() + other.splitlines()))


def latest(folder: Path) -> float:
    """When the last step of those in ``folder`` has started."""
    rows = read(folder / "summary.json").values()
    return max((row.get("started", 0) for row in rows), default=0)


def into(target: Path, folder: Path) -> None:
    """What lies in ``folder`` beside what ``target`` has: of what both have, the newer."""
    older = latest(folder) < latest(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.json*")):
        own, found = target / path.name, read(path)
        if path.suffix == ".jsonl":
            there = own.read_text() if own.exists() else ""
            own.write_text(lines(there, path.read_text()))
        elif path.name in ("summary.json", "tests.json"):
            write(own, newest(read(own), found))
        elif "benchmarks" in found:
            write(own, fold(read(own), found))
        elif not (older and own.exists()):
            with contextlib.suppress(ValueError):  # Taken while it was written.
                write(own, json.loads(path.read_text()))


def merge(folder: Path, results: Path) -> Path:
    """What lies in ``folder`` into ``results``/<GPU>, which is returned.

    Raises ValueError where about.json does not tell of which machine it is.
    """
    about = read(folder / "about.json")
    if "machine" not in about:
        raise ValueError(f"{folder / 'about.json'} names no machine")
    target = results / about["machine"]
    into(target, folder)
    return target
