"""Plots of rates beside the machine's limits: the roofline, and bandwidth by bytes moved."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from report.axes import BLUE, GREY, MARKERS, RED, log_axis, short
from report.model import OURS, Interval, Machine, ReportRow


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
            label=short(d or "no dtype", 16),
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


def roofline(ax: Axes, machine: Machine, rows: Sequence[ReportRow]) -> None:
    found = {id(row): x for row in rows if (x := intensity(row))}
    roofs = {k: v for k, v in machine.limits.items() if k != "copy"}
    copy = machine.limits.get("copy")
    ridges = [roof / copy for roof in roofs.values()] if copy else []
    x_low, x_high = _ends([*found.values(), *ridges])
    heights = [*_rates(rows, "FLOP"), *roofs.values()]
    log_axis(ax, "x", x_low, x_high)
    log_axis(ax, "y", *_ends(heights))
    handles = _points(ax, rows, lambda row: found[id(row)], "FLOP")
    styles = ("-", "--", "-.", ":")
    for i, (name, roof) in enumerate(roofs.items()):
        start = max(roof / copy, x_low) if copy else x_low
        style: dict[str, Any] = {"ls": styles[i % 4], "color": "#333333", "lw": 1.1}
        ax.plot([start, x_high], [roof, roof], zorder=1, **style)
        handles.append(Line2D([], [], label=f"{short(name, 16)}: {roof:,.0f} GFLOP/s", **style))
    if copy:
        end = max(ridges, default=x_high)
        ax.plot([x_low, end], [copy * x_low, copy * end], color="#333333", lw=1.1, zorder=1)
        handles.append(
            Line2D([], [], color="#333333", lw=1.1, label=f"slope: copy, {copy:,.0f} GB/s")
        )
    ax.set_xlabel("FLOP/byte")
    ax.set_ylabel("GFLOP/s")
    _legend(ax, handles)


def bandwidth(ax: Axes, machine: Machine, rows: Sequence[ReportRow]) -> None:
    copy = machine.limits.get("copy")
    log_axis(ax, "x", *_ends([row.known("bytes") or 1.0 for row in rows]))
    log_axis(ax, "y", *_ends([*_rates(rows, "bytes"), *([copy] if copy else [])]))
    handles = _points(ax, rows, lambda row: row.known("bytes") or 1.0, "bytes")
    if copy:
        ax.axhline(copy, color="#333333", lw=1.1, zorder=1)
        handles.append(Line2D([], [], color="#333333", lw=1.1, label=f"copy: {copy:,.0f} GB/s"))
    ax.set_xlabel("bytes moved")
    ax.set_ylabel("GB/s")
    _legend(ax, handles)


def with_rates(rows: Sequence[ReportRow]) -> tuple[list[ReportRow], list[ReportRow]]:
    """Return the rows for the roofline, and those for the plot of bandwidths."""
    shown = [r for r in rows if r.known("bytes") and (OURS in r.entries or "eager" in r.entries)]
    return [r for r in shown if r.known("FLOP")], [r for r in shown if not r.known("FLOP")]
