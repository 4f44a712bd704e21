"""The report's page: the tables of cells that ``page.html`` shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from report.axes import times
from report.model import (
    OURS,
    Interval,
    Machine,
    ProviderTime,
    ReportRow,
    Results,
    groups,
    mapping,
    number,
    positive,
    text,
)
from report.plots import figures

TEMPLATE = Path(__file__).with_name("page.html")
BEHIND = "▼ {} behind"


@dataclass(frozen=True)
class Cell:
    """A cell: its text, the value that it is sorted by, and its CSS class."""

    shown: str = ""
    value: float | str | None = None
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table: titles, whether each column holds numbers, and the rows."""

    caption: str
    titles: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[Cell]]


def _digits(value: float, digits: int = 4) -> str:
    """Return a number with so many digits, without an exponent unless it is extreme."""
    if 1e3 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def _number(value: float | None, digits: int = 4, kind: str = "") -> Cell:
    return Cell() if value is None else Cell(_digits(value, digits), value, kind)


def _span(interval: Interval | None, show: Callable[[float], str]) -> str:
    return f"{show(interval[0])} … {show(interval[1])}" if interval else ""


def _micros(seconds: float) -> str:
    return _digits(seconds * 1e6)


def _ratio(row: ReportRow, provider: str) -> Cell:
    ratio = row.ratio(provider)
    if provider == OURS or ratio is None:
        return Cell()
    return (
        Cell(BEHIND.format(times(ratio)), ratio, "bad") if ratio < 1 else Cell(times(ratio), ratio)
    )


def _judged(entry: ProviderTime) -> Cell:
    """Return the error over its budget."""
    error = number(entry.info.get("error_over_budget"))
    if error is None:
        return Cell()
    return (
        Cell(f"{error:.2f}", error)
        if error <= 1
        else Cell(f"▲ {_digits(error)} wrong", error, "bad")
    )


def _goal(row: ReportRow, entry: ProviderTime) -> Cell:
    """Return the goals of a row, and whether they are met."""
    if entry.provider != OURS:
        return Cell()
    said, missed = [], False
    for peer, value in mapping(entry.info.get("goal")).items():
        goal, ratio = positive(value), row.ratio(peer)
        if goal is None:
            continue
        verdict = "not measured" if ratio is None else "met" if ratio >= goal else "missed"
        missed = missed or verdict == "missed"
        said.append(f"{verdict}: {text(peer)} {goal:g}")
    return Cell("; ".join(said), "; ".join(said) or None, "bad goal" if missed else "goal")


def _provider(row: ReportRow, entry: ProviderTime) -> Cell:
    runs, ours = text(entry.info.get("runs")), row.entries.get(OURS)
    said = entry.provider + (f" (runs {runs})" if runs else "")
    other = "*" if ours and ours.run != entry.run else ""
    return Cell(said + other, said, "ours" if entry.provider == OURS else "")


def _percent(entry: ProviderTime) -> Cell:
    share = number(entry.info.get("share"))
    return Cell() if share is None else Cell(f"{share:.0%}", share)


def _info(key: str, scale: float = 1, digits: int = 4) -> Callable[[ReportRow, ProviderTime], Cell]:
    def cell(_row: ReportRow, entry: ProviderTime) -> Cell:
        value = number(entry.info.get(key))
        return _number(None if value is None else value * scale, digits)

    return cell


def _rate(key: str, given: str) -> Callable[[ReportRow, ProviderTime], Cell]:
    """Return a column of rates, from amount and median; else what the file says."""

    def cell(row: ReportRow, entry: ProviderTime) -> Cell:
        rate = row.rate(entry.provider, key)
        return _number(rate or positive(entry.info.get(given)), 3)

    return cell


def _interval(_row: ReportRow, entry: ProviderTime) -> Cell:
    span = entry.interval
    return Cell(_span(span, _micros), span[1] - span[0] if span else None)


#: Each column: its title, whether it holds numbers, and what makes the cell. A column without
#: values is left out.
COLUMNS: tuple[tuple[str, bool, Callable[[ReportRow, ProviderTime], Cell]], ...] = (
    ("row", False, lambda row, entry: Cell(row.short, row.name)),
    ("provider", False, _provider),
    ("median, µs", True, lambda row, entry: _number(entry.median * 1e6)),
    ("95 % interval, µs", True, _interval),
    ("time over ours", True, lambda row, entry: _ratio(row, entry.provider)),
    ("error/budget", True, lambda row, entry: _judged(entry)),
    ("relative error", True, _info("relative_error", digits=2)),
    ("GB/s", True, _rate("bytes", "GB/s")),
    ("GFLOP/s", True, _rate("FLOP", "GFLOP/s")),
    ("share of limit", True, lambda row, entry: _percent(entry)),
    ("tokens/s", True, _info("tokens/s")),
    ("launch, µs", True, _info("launch_us", digits=3)),
    ("peak, MiB", True, _info("peak_bytes", 2.0**-20, 3)),
    ("goal", False, _goal),
)


def _op_table(op: str, rows: Sequence[ReportRow]) -> Table:
    pairs = [(row, entry) for row in rows for entry in row.entries.values()]
    columns = [[make(row, entry) for row, entry in pairs] for _, _, make in COLUMNS]
    filled = [i for i, cells in enumerate(columns) if any(c.value is not None for c in cells)]
    listed = [list(line) for line in zip(*(columns[i] for i in filled), strict=True)]
    titles, numeric = [COLUMNS[i][0] for i in filled], [COLUMNS[i][1] for i in filled]
    return Table(f"Every row and provider of {op}", titles, numeric, listed)


def _headline(machine: Machine) -> Table:
    """Return the table of ratios to eager, by op, dtype and direction."""
    titles = ["op", "dtype", "direction", "speed-up over eager", "worst … best size"]
    titles += ["rows won", "rows lost", "rows a peer is ahead"]
    listed = []
    for group in groups(machine):
        ratios, mean = group.ratios, group.mean
        lost = sum(ratio < 1 for ratio in ratios)
        ahead = sum(any(row.ahead) for row in group.rows)
        average = Cell("not measured")
        if mean is not None:
            average = (
                Cell(BEHIND.format(times(mean)), mean, "bad")
                if mean < 1
                else Cell(times(mean), mean)
            )
        span = (min(ratios), max(ratios)) if ratios else None
        listed.append(
            [
                *(Cell(name, name) for name in (group.op, group.dtype, group.direction)),
                average,
                Cell(_span(span, times), span[0] if span else None),
                Cell(str(len(ratios) - lost), len(ratios) - lost),
                _lost(lost),
                _lost(ahead),
            ]
        )
    return Table("Against eager", titles, [False] * 3 + [True] * 5, listed)


def _lost(count: int) -> Cell:
    return Cell(f"▼ {count}", count, "bad") if count else Cell("0", 0)


def _behind(machine: Machine) -> Table:
    """Return every row and peer that is faster than ours, the worst first."""
    found = [(*pair, row) for row in machine.rows.values() for pair in row.ahead]
    listed = []
    for ratio, provider, row in sorted(found, key=lambda item: item[0]):
        span, ours, peer = row.ratio_interval(provider), row.entries[OURS], row.entries[provider]
        unsure = " includes 1" if span and span[1] >= 1 else ""
        listed.append(
            [
                Cell(BEHIND.format(times(ratio)), ratio, "bad"),
                Cell(row.name, row.name),
                _provider(row, peer),
                _number(ours.median * 1e6),
                _number(peer.median * 1e6),
                Cell(_span(span, times) + unsure, span[0] if span else None),
            ]
        )
    titles = [
        "peer's time over ours",
        "row",
        "peer",
        "ours, µs",
        "peer, µs",
        "95 % interval of the ratio",
    ]
    return Table("Where a peer is ahead", titles, [True, False, False, True, True, True], listed)


def _wrong(machine: Machine) -> Table:
    listed = [
        [Cell(provider, provider), Cell(row, row), Cell(f"✗ {why or 'no time'}", why, "bad")]
        for (row, provider), why in machine.wrong.items()
    ]
    return Table("No time: a wrong result", ["provider", "row", "why"], [False] * 3, listed)


def _described(value: object) -> str:
    """Return a dictionary as one line."""
    if not isinstance(value, dict):
        return text(value)
    return ", ".join(f"{text(k)} {text(v)}" for k, v in value.items())


def _facts(machine: Machine) -> list[tuple[str, str]]:
    about = machine.about
    limits = [
        f"{name} {_digits(limit)} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name, limit in machine.limits.items()
    ]
    facts = [("machine", machine.name)]
    facts += [(key, _described(about.get(key))) for key in ("gpu", "cpu", "torch", "threads")]
    facts += [("limits, measured", ", ".join(limits))]
    facts += [(key, _described(about.get(key))) for key in ("state", "settings")]
    facts += [("versions", _described(machine.versions))]
    for i, run in enumerate(machine.runs, 1):
        said = [
            run.date,
            f"commit {run.commit}" if run.commit else "",
            run.torch and f"torch {run.torch}",
        ]
        facts.append(
            (f"run {i}" if len(machine.runs) > 1 else "run", ", ".join(filter(None, said)))
        )
    return [(key, value) for key, value in facts if value]


def _mixed(machine: Machine) -> bool:
    """Return True if a row has providers of more than one run."""
    return any(len({e.run for e in row.entries.values()}) > 1 for row in machine.rows.values())


def _section(index: int, machine: Machine) -> dict:
    """Return what the template shows of a machine."""
    ops = []
    for i, (op, rows) in enumerate(machine.ops.items()):
        prefix = f"m{index}-op{i}"
        plots = [(caption, Markup(svg)) for caption, svg in figures(machine, rows, prefix)]
        ops.append({"id": prefix, "name": op, "plots": plots, "table": _op_table(op, rows)})
    return {
        "id": f"m{index}",
        "name": machine.name,
        "facts": _facts(machine),
        "ops": ops,
        "ours_known": machine.measured_here,
        "mixed": _mixed(machine),
        "headline": _headline(machine),
        "behind": _behind(machine),
        "wrong": _wrong(machine),
        "absent": sorted(machine.absent.items()),
    }


def render(results: Results) -> str:
    """Return the page as HTML."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(machines=[_section(i, m) for i, m in enumerate(results.machines)])
