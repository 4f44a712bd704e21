"""The report's data: machines, rows and times, read from benchmark results.

Any pytest-benchmark file whose tests have a parameter ``provider`` is read, and baselines are, too.
A group of benchmarks is a row, and each provider's time for it an entry. Files of one machine are
merged; later files win. The content of a file is not trusted: any key may be missing, any name
hostile.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import baseline

#: The provider that is this package. Names that begin so are variants of ours, and no peers.
OURS = "kernel"

_DTYPE = re.compile(r"\b(bfloat16|float16|float32|float64|int8)\b")
_DIRECTION = re.compile(r"\b(forward ?\+ ?backward|forward|backward|inference|training|decode)\b")

Interval = tuple[float, float]


def number(value: object) -> float | None:
    """Return a finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def positive(value: object) -> float | None:
    """Return a finite number above zero; None for anything else."""
    found = number(value)
    return found if found is not None and found > 0 else None


def text(value: object) -> str:
    """Return one printable line of whatever a file holds; empty for None."""
    if value is None:
        return ""
    line = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    line = line.encode("utf-8", "replace").decode()  # A lone surrogate cannot be written.
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e]+", " ", line).split())


def mapping(value: object) -> dict:
    """Return a dictionary; empty for anything else."""
    return value if isinstance(value, dict) else {}


def listing(value: object) -> list:
    """Return a list; empty for anything else."""
    return value if isinstance(value, list) else []


def _interval(value: object) -> Interval | None:
    """Return two numbers above zero, the smaller first."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = map(positive, value)
    return (min(low, high), max(low, high)) if low and high else None


def _divide(a: float | None, b: float | None) -> float | None:
    return positive(a / b) if a and b else None


@dataclass(frozen=True)
class ProviderTime:
    """A provider's median time for a row, in seconds, in the run of that number."""

    provider: str
    median: float
    info: dict
    run: int

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the median, in seconds."""
        return _interval(self.info.get("median_ci"))


@dataclass
class ReportRow:
    """A row: what was computed, and each provider's time."""

    name: str
    op: str
    dtype: str
    direction: str
    entries: dict[str, ProviderTime] = field(default_factory=dict)

    @property
    def products(self) -> str:
        """The dtype of the multiply-accumulates, whose roof a rate is held against.

        It is int8 for int8 weights, though inputs and results may be float.
        """
        said = (text(entry.info.get("products")) for entry in self.entries.values())
        return next(filter(None, said), self.dtype)

    @property
    def short(self) -> str:
        """The name without the op, for a table of that op alone."""
        return self.name.removeprefix(self.op).strip() or self.name

    def ratio(self, provider: str) -> float | None:
        """Return the provider's median over ours: above 1 ours is faster."""
        ours, peer = self.entries.get(OURS), self.entries.get(provider)
        return _divide(peer.median, ours.median) if ours and peer else None

    def ratio_interval(self, provider: str) -> Interval | None:
        """Return that ratio's interval: by rounds for eager, else from both medians' intervals."""
        ratio = self.ratio(provider)
        if ratio is None:
            return None
        ours, peer = self.entries[OURS], self.entries[provider]
        found = _interval(ours.info.get("vs_eager_ci")) if provider == "eager" else None
        if found is None or ours.run != peer.run:
            if not ours.interval or not peer.interval:
                return None
            low = _divide(peer.interval[0], ours.interval[1])
            high = _divide(peer.interval[1], ours.interval[0])
            if low is None or high is None:
                return None
            found = low, high
        return min(found[0], ratio), max(found[1], ratio)

    def known(self, key: str) -> float | None:
        """Return a fact of the whole row, such as ``bytes``, from the first entry that has it."""
        return next((n for e in self.entries.values() if (n := positive(e.info.get(key)))), None)

    def rate(self, provider: str, key: str) -> float | None:
        """Return ``bytes`` or ``FLOP`` per second, in units of 1e9."""
        done = self.known(key)
        return _divide(done / 1e9 if done else None, self.entries[provider].median)

    @property
    def ahead(self) -> Iterator[tuple[float, str]]:
        """Ratio and name of each provider that is faster than ours and not a variant of ours."""
        for provider in (p for p in self.entries if not p.startswith(OURS)):
            ratio = self.ratio(provider)
            if ratio is not None and ratio < 1:
                yield ratio, provider


@dataclass(frozen=True)
class Run:
    """Date, commit and torch version of a file."""

    date: str
    commit: str
    torch: str


@dataclass
class Machine:
    """All rows of a machine. ``wrong`` says why a row and provider has no time, ``absent`` why a
    provider has none at all."""

    name: str
    measured_here: bool = False
    about: dict = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    rows: dict[str, ReportRow] = field(default_factory=dict)
    wrong: dict[tuple[str, str], str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def limits(self) -> dict[str, float]:
        """The measured limits: ``copy`` in GB/s, products by dtype in GFLOP/s."""
        limits = mapping(self.about.get("limits"))
        return {text(k): n for k, v in limits.items() if (n := positive(v))}

    @property
    def ops(self) -> dict[str, list[ReportRow]]:
        """The rows by op."""
        found: dict[str, list[ReportRow]] = {}
        for row in self.rows.values():
            found.setdefault(row.op, []).append(row)
        return found

    @property
    def versions(self) -> dict[str, str]:
        """The versions of all libraries that were measured."""
        found = [e.info.get("versions") for r in self.rows.values() for e in r.entries.values()]
        merged: dict[str, str] = {}
        for versions in [*found, self.about.get("versions")]:
            merged |= {text(k): text(v) for k, v in mapping(versions).items()}
        return dict(sorted(merged.items()))


@dataclass(frozen=True)
class Results:
    """All machines of the report."""

    machines: list[Machine]


@dataclass(frozen=True)
class Group:
    """Rows that differ in size alone, and their ratios against eager."""

    op: str
    dtype: str
    direction: str
    rows: list[ReportRow]

    @property
    def ratios(self) -> list[float]:
        return [ratio for row in self.rows if (ratio := row.ratio("eager"))]

    @property
    def mean(self) -> float | None:
        """The geometric mean of the ratios."""
        if not self.ratios:
            return None
        return math.exp(sum(map(math.log, self.ratios)) / len(self.ratios))


def groups(machine: Machine) -> list[Group]:
    """Return the rows by op, direction and dtype."""
    found: dict[tuple[str, str, str], list[ReportRow]] = {}
    for rows in machine.ops.values():
        for row in rows:
            found.setdefault((row.op, row.dtype, row.direction), []).append(row)
    return [Group(*key, rows) for key, rows in found.items()]


def markdown(machine: Machine) -> str:
    """Return a table of eager's time over ours: the geometric mean over sizes, and the range."""

    def cell(found: Group | None) -> str:
        if found is None or found.mean is None:
            return ""
        low, high = (f"{r:.1f}" for r in (min(found.ratios), max(found.ratios)))
        return f"{found.mean:.1f}" + (f" ({low}-{high})" if low != high else "")

    listed = {(g.op, g.direction, g.dtype): g for g in groups(machine)}
    dtypes = sorted({dtype for *_, dtype in listed}, reverse=True)
    lines = [f"| {machine.name} | | {' | '.join(dtypes)} |", "|---|---|" + "---|" * len(dtypes)]
    for op, direction in dict.fromkeys((op, direction) for op, direction, _ in listed):
        cells = (cell(listed.get((op, direction, dtype))) for dtype in dtypes)
        lines.append(f"| {op} | {direction} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _load(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON: {e}") from e
    if isinstance(found, dict) and {"machine", "runs", "rows"} <= found.keys():
        try:
            return baseline.as_result(found)
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise ValueError(f"{path}: not a baseline: {e!r}") from e
    if not isinstance(found, dict) or not isinstance(found.get("benchmarks"), list):
        raise ValueError(f"{path}: not a pytest-benchmark file: no list of benchmarks")
    return found


def _provider(benchmark: object) -> str:
    return text(mapping(mapping(benchmark).get("params")).get("provider"))


def _without(name: str, provider: str) -> str:
    """Return a test's name without the provider among its parameters."""
    test, bracket, params = name.partition("[")
    pattern = rf"(?:^|-){re.escape(provider)}(?=-|$)"
    rest = re.sub(pattern, "", params.removesuffix("]"), count=1).strip("-")
    return f"{test}[{rest}]" if bracket and rest else test


def _last(pattern: re.Pattern, name: str) -> str:
    return next(reversed(pattern.findall(name)), "")


def _row(benchmark: dict, provider: str) -> ReportRow:
    """Return the row that a benchmark belongs to, without entries."""
    info = mapping(benchmark.get("extra_info"))
    given = text(benchmark.get("fullname")) or text(benchmark.get("name")) or "unnamed"
    name = text(benchmark.get("group")) or _without(given, provider)
    op = text(info.get("op")) or name.partition("[")[0].strip() or name
    dtype = text(info.get("dtype")) or _last(_DTYPE, name)
    direction = text(info.get("direction")) or _last(_DIRECTION, name)
    return ReportRow(name, op, dtype, direction.replace(" + ", "+"))


def _machine_name(found: dict) -> str:
    about = mapping(found.get("machine_info"))
    cpu = mapping(about.get("cpu")).get("brand_raw")
    named = mapping(about.get("llmos")).get("machine")
    return text(named) or text(cpu) or text(about.get("node")) or "unknown machine"


def _about(machine: Machine, found: dict) -> None:
    """Add what a file says of its machine and its run."""
    about = mapping(mapping(found.get("machine_info")).get("llmos"))
    machine.measured_here = machine.measured_here or bool(about)
    for key, value in about.items():
        old = mapping(machine.about.get(key))
        machine.about[key] = {**old, **value} if isinstance(value, dict) else value
    commit = mapping(found.get("commit_info"))
    dirty = " with changes" if commit.get("dirty") is True else ""
    name = text(commit.get("id"))[:12]
    machine.runs.append(
        Run(text(found.get("datetime")), f"{name}{dirty}" if name else "", text(about.get("torch")))
    )


def _add(machine: Machine, found: dict, path: Path) -> None:
    """Add the entries of a file."""
    run, seen = len(machine.runs) - 1, set()
    for benchmark in found["benchmarks"]:
        provider = _provider(benchmark)
        if not provider:
            continue
        row = _row(benchmark, provider)
        median = positive(mapping(benchmark.get("stats")).get("median"))
        if median is None:
            raise ValueError(f"{path}: {row.name!r} has no median for {provider!r}")
        if (row.name, provider) in seen:
            raise ValueError(f"{path}: {row.name!r} has the provider {provider!r} twice")
        seen.add((row.name, provider))
        entry = ProviderTime(provider, median, mapping(benchmark.get("extra_info")), run)
        machine.rows.setdefault(row.name, row).entries[provider] = entry
        machine.wrong.pop((row.name, provider), None)
        machine.absent.pop(provider, None)


def _add_failures(machine: Machine, found: dict) -> None:
    """Add what has no time. A wrong result is no result: an older time is removed."""
    notes = mapping(found.get("llmos"))
    for wrong in map(mapping, listing(notes.get("wrong"))):
        name, provider = text(wrong.get("group")), text(wrong.get("provider"))
        machine.wrong[name, provider] = text(wrong.get("why"))
        row = machine.rows.get(name)
        if row and row.entries.pop(provider, None) and not row.entries:
            del machine.rows[name]
    for provider, why in mapping(notes.get("absent")).items():
        machine.absent[text(provider)] = text(why)


def read(paths: Sequence[Path]) -> Results:
    """Return the results of all files, merged by machine.

    Raises:
        ValueError: A file is of no use; the message names it and says why.
    """
    machines: dict[str, Machine] = {}
    for path in paths:
        found = _load(path)
        if not any(map(_provider, found["benchmarks"])):
            raise ValueError(f"{path}: no benchmark has a parameter 'provider'")
        name = _machine_name(found)
        machine = machines.setdefault(name, Machine(name))
        _about(machine, found)
        _add(machine, found, path)
        _add_failures(machine, found)
    if not machines:
        raise ValueError("no files to report on")
    return Results([*machines.values()])
