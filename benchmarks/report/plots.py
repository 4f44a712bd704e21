"""Draw the report's plots: speed-ups, and an op's and the whole report's figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from report.axes import BLUE, GREY, LIGHT, RED, framed, log_axis, short, styled, svg, times
from report.model import OURS, Group, Interval, Machine, ReportRow, Results, groups
from report.rates import bandwidth, roofline, with_rates


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
    log_axis(ax, "x", min([0.8, *values]) / 1.08, max([1.5, *values]) * 1.08)
    ax.axvline(1, color="black", linewidth=1.2, zorder=4)
    ax.set_ylim(lines - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(label)


def _compared(row: ReportRow) -> list[str]:
    return [p for p in row.entries if p != OURS and row.ratio(p)]


def _speedups(rows: Sequence[ReportRow]) -> Figure:
    """Return a figure of every peer's time over ours, row by row."""
    lines = sum(len(_compared(row)) + 1.3 for row in rows)
    figure = framed(5.6, 0.19 * lines + 0.75, (1.3, 1.05, 0.15, 0.55))
    ax, y, values, places, names = figure.add_subplot(), 0.0, [], [], []
    for row in rows:
        label = short(row.short, 60)
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
            names.append(short(provider, 18))
        y += 1.3
    _ratio_axis(ax, values, lines, "the peer's time over ours: right of 1 ours is faster")
    ax.set_yticks(places, names, fontsize=8)
    return figure


@styled
def figures(machine: Machine, rows: Sequence[ReportRow], prefix: str) -> list[tuple[str, str]]:
    """Return captions and SVGs of an op."""
    made: list[tuple[str, Figure]] = []
    for caption, draw, shown in zip(
        ("Rate against the machine's limits", "Bandwidth against the machine's copy"),
        (roofline, bandwidth),
        with_rates(rows),
        strict=True,
    ):
        if shown:
            figure = framed(5.4, 4.3, (0.75, 0.15, 0.15, 1.45))
            draw(figure.add_subplot(), machine, shown)
            made.append((caption, figure))
    by_direction: dict[str, list[ReportRow]] = {}
    for row in rows:
        if _compared(row):
            by_direction.setdefault(row.direction, []).append(row)
    for direction, shown in by_direction.items():
        made.append((f"Speed-up, {direction}" if direction else "Speed-up", _speedups(shown)))
    return [(c, svg(f, f"{prefix}-{i}", c)) for i, (c, f) in enumerate(made)]


def _overview(ax: Axes, machine: Machine, found: dict[tuple[str, str], list[Group]]) -> None:
    """Draw a bar for each dtype, by op and direction."""
    dtypes = [*dict.fromkeys(g.dtype for listed in found.values() for g in listed)]
    shades = [BLUE, LIGHT, "#5b7f3a", "#b5a642", GREY]
    y, values, places, names = 0.0, [], [], []
    for (op, direction), listed in found.items():
        places.append(y + 0.4 * (len(listed) - 1))
        names.append(short(f"{op} {direction}".strip(), 40))
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
    ax.set_title(short(machine.name, 80), fontsize=10, loc="left", pad=22)
    patches: list[Any] = [
        Patch(color=shades[i % len(shades)], label=short(d or "no dtype", 16))
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
            said = f"{short(machine.name, 80)}: nothing to compare with eager"
            figure.text(0.05, (top + height / 2) / total, said)
    return figure


def _roofline_figure(results: Results) -> Figure:
    count = len(results.machines)
    figure = framed(9, 4.6 * count, (0.7, 0.15, 0.4, 1.45))
    figure.subplots_adjust(hspace=0.55, wspace=0.25)
    for i, machine in enumerate(results.machines):
        shown = with_rates([*machine.rows.values()])
        for j, (draw, rows) in enumerate(zip((roofline, bandwidth), shown, strict=True)):
            ax = figure.add_subplot(count, 2, 2 * i + j + 1)
            if rows:
                draw(ax, machine, rows)
            else:
                ax.axis("off")
                ax.text(
                    0.5, 0.5, "no rows with FLOP" if j == 0 else "no rows without FLOP", ha="center"
                )
            if j == 0:
                ax.set_title(short(machine.name, 80), fontsize=10, loc="left")
    return figure


@styled
def save(results: Results, folder: Path) -> None:
    """Write ``speedup.png`` and ``roofline.png``, 900 pixels wide on a dense screen."""
    for name, figure in (("speedup", _speedup_figure), ("roofline", _roofline_figure)):
        figure(results).savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
