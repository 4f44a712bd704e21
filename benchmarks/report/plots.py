"""Draw the report's plots: rooflines, bandwidths and speed-ups, the same for the same data."""

import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from report.model import OURS, Group, Interval, Machine, ReportRow, Results, groups

BLUE, LIGHT, GREY, RED = "#1f4e9e", "#8fb4e8", "#666666", "#c00020"
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^", "int8": "D"}
#: Names are not read as formulas, and text stays text.
STYLE: Any = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "llmos",
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
}


def styled(function: Callable) -> Callable:
    """Run a function in the report's style, without warnings of letters that the font lacks."""

    @functools.wraps(function)
    def run(*args):
        with matplotlib.rc_context(), warnings.catch_warnings():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
            return function(*args)

    return run


def _short(name: str, length: int) -> str:
    """Return a name cut to a length, which a legend or a tick accepts."""
    short = name if len(name) <= length else f"{name[: length - 1]}…"
    return f" {short}" if short.startswith("_") else short


def times(ratio: float) -> str:
    """Return a ratio in three digits; one below 1 never reads 1."""
    if ratio >= 100:
        return f"{ratio:,.0f}"
    return f"{min(ratio, 0.999) if ratio < 1 else ratio:#.3g}"


def _ticks(low: float, high: float, max_ticks: int = 8) -> list[float]:
    """Return round values for a logarithmic axis: more where they fit, else powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1)
    choices = (
        ((1, 1.5, 2, 3, 5, 7), 1),
        ((1, 2, 5), 1),
        ((1,), 1),
        ((1,), len(powers) // max_ticks + 1),
    )
    for digits, step in choices:
        found = [m * 10.0**p for p in powers[::step] for m in digits if low <= m * 10.0**p <= high]
        if len(found) <= max_ticks:
            break
    return found


def _plain(value: float, _position: int | None = None) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= value < 1e15:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _log(ax: Axes, axis: str, low: float, high: float) -> None:
    """Make an axis logarithmic, from ``low`` to ``high``."""
    of = ax.xaxis if axis == "x" else ax.yaxis
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
    (ax.set_xlim if axis == "x" else ax.set_ylim)(low, high)
    of.set_major_locator(FixedLocator(_ticks(low, high)))
    of.set_minor_locator(NullLocator())
    of.set_major_formatter(FuncFormatter(_plain))
    of.grid(color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)


def _points(
    ax: Axes, rows: Sequence[ReportRow], x_of: Callable[[ReportRow], float], key: str
) -> list[Any]:
    """Draw ours filled, eager hollow and a line between the two, marked by the dtype of the
    products; return the legend's handles."""
    lost = False
    for row in rows:
        x, marker, y = x_of(row), MARKERS.get(row.products, "v"), {}
        for provider in ("eager", OURS):
            if provider in row.entries and (rate := row.rate(provider, key)):
                y[provider] = rate
        if len(y) == 2:
            behind = y["eager"] > y[OURS]
            lost = lost or behind
            color, style = (RED, "--") if behind else ("#bbbbbb", "-")
            ax.plot([x, x], [*y.values()], style, color=color, linewidth=1, zorder=2)
        for provider, rate in y.items():
            face = BLUE if provider == OURS else "white"
            edge = BLUE if provider == OURS else GREY
            ax.plot(x, rate, marker, ms=6, mfc=face, mec=edge, mew=1.1, zorder=3)
    handles = [
        Line2D(
            [],
            [],
            marker=MARKERS.get(d, "v"),
            ls="",
            mfc=BLUE,
            mec=BLUE,
            label=_short(d or "no dtype", 16),
        )
        for d in dict.fromkeys(row.products for row in rows)
    ]
    handles.append(Line2D([], [], marker="o", ls="", mfc="white", mec=GREY, label="hollow: eager"))
    if lost:
        handles.append(Line2D([], [], color=RED, ls="--", lw=1.1, label="eager is ahead"))
    return handles


def _ends(values: Sequence[float]) -> Interval:
    return min(values) / 1.6, max(values) * 1.6


def _rates(rows: Sequence[ReportRow], key: str) -> list[float]:
    shown = [(r, p) for r in rows for p in (OURS, "eager") if p in r.entries]
    return [rate for r, p in shown if (rate := r.rate(p, key))]


def _legend(ax: Axes, handles: Sequence[Any]) -> None:
    labels = [str(h.get_label()) for h in handles]
    ax.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(-0.12, -0.16),
        ncols=2,
        fontsize=8,
        handlelength=2.4,
        columnspacing=1.2,
    )


def intensity(row: ReportRow) -> float | None:
    """Return the FLOP per byte that must move."""
    flop, moved = row.known("FLOP"), row.known("bytes")
    return flop / moved if flop and moved else None


def _roofline(ax: Axes, machine: Machine, rows: Sequence[ReportRow]) -> None:
    found = {id(row): x for row in rows if (x := intensity(row))}
    roofs = {k: v for k, v in machine.limits.items() if k != "copy"}
    copy = machine.limits.get("copy")
    ridges = [roof / copy for roof in roofs.values()] if copy else []
    x_low, x_high = _ends([*found.values(), *ridges])
    heights = [*_rates(rows, "FLOP"), *roofs.values()]
    _log(ax, "x", x_low, x_high)
    _log(ax, "y", *_ends(heights))
    handles = _points(ax, rows, lambda row: found[id(row)], "FLOP")
    styles = ("-", "--", "-.", ":")
    for i, (name, roof) in enumerate(roofs.items()):
        start = max(roof / copy, x_low) if copy else x_low
        style: dict[str, Any] = {"ls": styles[i % 4], "color": "#333333", "lw": 1.1}
        ax.plot([start, x_high], [roof, roof], zorder=1, **style)
        handles.append(Line2D([], [], label=f"{_short(name, 16)}: {roof:,.0f} GFLOP/s", **style))
    if copy:
        end = max(ridges, default=x_high)
        ax.plot([x_low, end], [copy * x_low, copy * end], color="#333333", lw=1.1, zorder=1)
        handles.append(
            Line2D([], [], color="#333333", lw=1.1, label=f"slope: copy, {copy:,.0f} GB/s")
        )
    ax.set_xlabel("FLOP/byte")
    ax.set_ylabel("GFLOP/s")
    _legend(ax, handles)


def _bandwidth(ax: Axes, machine: Machine, rows: Sequence[ReportRow]) -> None:
    copy = machine.limits.get("copy")
    _log(ax, "x", *_ends([row.known("bytes") or 1.0 for row in rows]))
    _log(ax, "y", *_ends([*_rates(rows, "bytes"), *([copy] if copy else [])]))
    handles = _points(ax, rows, lambda row: row.known("bytes") or 1.0, "bytes")
    if copy:
        ax.axhline(copy, color="#333333", lw=1.1, zorder=1)
        handles.append(Line2D([], [], color="#333333", lw=1.1, label=f"copy: {copy:,.0f} GB/s"))
    ax.set_xlabel("bytes moved")
    ax.set_ylabel("GB/s")
    _legend(ax, handles)


def _with_rates(rows: Sequence[ReportRow]) -> tuple[list[ReportRow], list[ReportRow]]:
    """Return the rows for the roofline, and those for the plot of bandwidths."""
    shown = [r for r in rows if r.known("bytes") and (OURS in r.entries or "eager" in r.entries)]
    return [r for r in shown if r.known("FLOP")], [r for r in shown if not r.known("FLOP")]


def _bar(
    ax: Axes, y: float, ratio: float, span: Interval | None, height: float, color: str
) -> None:
    """Draw a bar from 1 to the ratio, red and hatched where ours is slower."""
    style: dict[str, Any] = {"fc": color, "ec": color}
    if ratio < 1:
        style = {"fc": "white", "ec": RED, "hatch": "/////"}
    ax.barh(y, ratio - 1, height, left=1, linewidth=0.8, zorder=2, **style)
    if span:
        ax.plot(span, [y, y], color="black", linewidth=1, zorder=3)
        ax.plot(span, [y, y], "|", color="black", markersize=4, zorder=3)


def _value(ax: Axes, y: float, ratio: float, size: float) -> None:
    """Write the ratio, right of the axes."""
    behind = ratio < 1
    said = f"▼ {times(ratio)} behind" if behind else times(ratio)
    ax.text(
        1.01,
        y,
        said,
        transform=ax.get_yaxis_transform(),
        va="center",
        fontsize=size,
        color=RED if behind else "black",
        fontweight="bold" if behind else "normal",
    )


def _ratio_axis(ax: Axes, values: Sequence[float], lines: float, label: str) -> None:
    _log(ax, "x", min([0.8, *values]) / 1.08, max([1.5, *values]) * 1.08)
    ax.axvline(1, color="black", linewidth=1.2, zorder=4)
    ax.set_ylim(lines - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(label)


def _framed(width: float, height: float, edges: tuple[float, float, float, float]) -> Figure:
    """Return a figure with margins in inches: left, right, top, bottom."""
    figure = Figure((width, height))
    left, right, top, bottom = edges
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure


def _compared(row: ReportRow) -> list[str]:
    return [p for p in row.entries if p != OURS and row.ratio(p)]


def _speedups(rows: Sequence[ReportRow]) -> Figure:
    """Return a figure of every peer's time over ours, row by row."""
    lines = sum(len(_compared(row)) + 1.3 for row in rows)
    figure = _framed(5.6, 0.19 * lines + 0.75, (1.3, 1.05, 0.15, 0.55))
    ax, y, values, places, names = figure.add_subplot(), 0.0, [], [], []
    for row in rows:
        label = _short(row.short, 60)
        ax.text(
            -0.37,
            y + 0.08,
            label,
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=8,
            fontweight="bold",
            zorder=5,
            bbox={"fc": "white", "ec": "none", "pad": 0.6},
        )
        for provider in _compared(row):
            y += 1
            ratio, span = row.ratio(provider) or 1.0, row.ratio_interval(provider)
            _bar(ax, y, ratio, span, 0.66, BLUE if provider == "eager" else LIGHT)
            _value(ax, y, ratio, 8)
            values += [ratio, *(span or ())]
            places.append(y)
            names.append(_short(provider, 18))
        y += 1.3
    _ratio_axis(ax, values, lines, "the peer's time over ours: right of 1 ours is faster")
    ax.set_yticks(places, names, fontsize=8)
    return figure


def _svg(figure: Figure, prefix: str, label: str) -> str:
    """Return the figure as an SVG element with prefixed ids and no external reference."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    found = file.getvalue()
    found = re.sub(r"<metadata>.*?</metadata>", "", found[found.index("<svg") :], flags=re.DOTALL)

    def prefixed(tag: re.Match) -> str:
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", tag[0])

    found = re.sub(r"<[^>]*>", prefixed, found)
    opening = f'<svg role="img" aria-label="{escape(label)}"'
    found = re.sub(r' xmlns(:xlink)?="[^"]*"', "", found)
    return found.replace("<svg", opening, 1).strip()


@styled
def figures(machine: Machine, rows: Sequence[ReportRow], prefix: str) -> list[tuple[str, str]]:
    """Return captions and SVGs of an op."""
    made: list[tuple[str, Figure]] = []
    for caption, draw, shown in zip(
        ("Rate against the machine's limits", "Bandwidth against the machine's copy"),
        (_roofline, _bandwidth),
        _with_rates(rows),
        strict=True,
    ):
        if shown:
            figure = _framed(5.4, 4.3, (0.75, 0.15, 0.15, 1.45))
            draw(figure.add_subplot(), machine, shown)
            made.append((caption, figure))
    by_direction: dict[str, list[ReportRow]] = {}
    for row in rows:
        if _compared(row):
            by_direction.setdefault(row.direction, []).append(row)
    for direction, shown in by_direction.items():
        made.append((f"Speed-up, {direction}" if direction else "Speed-up", _speedups(shown)))
    return [(c, _svg(f, f"{prefix}-{i}", c)) for i, (c, f) in enumerate(made)]


def _overview(ax: Axes, machine: Machine, found: dict[tuple[str, str], list[Group]]) -> None:
    """Draw a bar for each dtype, by op and direction."""
    dtypes = [*dict.fromkeys(g.dtype for listed in found.values() for g in listed)]
    shades = [BLUE, LIGHT, "#5b7f3a", "#b5a642", GREY]
    y, values, places, names = 0.0, [], [], []
    for (op, direction), listed in found.items():
        places.append(y + 0.4 * (len(listed) - 1))
        names.append(_short(f"{op} {direction}".strip(), 40))
        for group in listed:
            span = min(group.ratios), max(group.ratios)
            color = shades[dtypes.index(group.dtype) % len(shades)]
            _bar(ax, y, group.mean or 1.0, span if len(group.ratios) > 1 else None, 0.72, color)
            _value(ax, y, group.mean or 1.0, 8)
            values += [group.mean or 1.0, *span]
            y += 0.8
        y += 0.35
    label = "eager's time over ours: geometric mean of the sizes, the line from worst to best"
    _ratio_axis(ax, values, y - 0.4, label)
    ax.set_yticks(places, names, fontsize=8.5)
    ax.set_title(_short(machine.name, 80), fontsize=10, loc="left", pad=22)
    patches: list[Any] = [
        Patch(color=shades[i % len(shades)], label=_short(d or "no dtype", 16))
        for i, d in enumerate(dtypes)
    ]
    patches.append(Patch(fc="white", ec=RED, hatch="/////", label="behind eager"))
    ax.legend(handles=patches, loc="lower left", bbox_to_anchor=(0, 1), ncols=6, fontsize=8)


def _speedup_figure(results: Results) -> Figure:
    by_machine: list[tuple[Machine, dict[tuple[str, str], list[Group]]]] = []
    for machine in results.machines:
        found: dict[tuple[str, str], list[Group]] = {}
        for group in groups(machine):
            if group.ratios:
                found.setdefault((group.op, group.direction), []).append(group)
        by_machine.append((machine, found))
    heights = [0.155 * sum(0.8 * len(g) + 0.35 for g in f.values()) + 1.2 for _, f in by_machine]
    total = sum(heights)
    figure, top = Figure((9, total)), total
    for (machine, found), height in zip(by_machine, heights, strict=True):
        box = (2.9 / 9, (top - height + 0.55) / total, 5 / 9, (height - 1.2) / total)
        top -= height
        if found:
            _overview(figure.add_axes(box), machine, found)
        else:
            said = f"{_short(machine.name, 80)}: nothing to compare with eager"
            figure.text(0.05, (top + height / 2) / total, said)
    return figure


def _roofline_figure(results: Results) -> Figure:
    count = len(results.machines)
    figure = _framed(9, 4.6 * count, (0.7, 0.15, 0.4, 1.45))
    figure.subplots_adjust(hspace=0.55, wspace=0.25)
    for i, machine in enumerate(results.machines):
        shown = _with_rates([*machine.rows.values()])
        for j, (draw, rows) in enumerate(zip((_roofline, _bandwidth), shown, strict=True)):
            ax = figure.add_subplot(count, 2, 2 * i + j + 1)
            if rows:
                draw(ax, machine, rows)
            else:
                ax.axis("off")
                ax.text(
                    0.5, 0.5, "no rows with FLOP" if j == 0 else "no rows without FLOP", ha="center"
                )
            if j == 0:
                ax.set_title(_short(machine.name, 80), fontsize=10, loc="left")
    return figure


@styled
def save(results: Results, folder: Path) -> None:
    """Write ``speedup.png`` and ``roofline.png``, 900 pixels wide on a dense screen."""
    for name, figure in (("speedup", _speedup_figure), ("roofline", _roofline_figure)):
        figure(results).savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
