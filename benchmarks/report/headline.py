"""Draw the figure of the README: torch eager's time over ours for whole models, by machine."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from report.axes import BLUE, LIGHT, RED, styled, times
from report.model import Machine, ReportRow, Results, mapping, text

#: The number of bars, over all machines.
BARS = 10
#: The rows and their labels, the most important first.
ROWS = {
    "minilm [64, 128] float32 inference": "MiniLM, inference",
    "minilm [64, 128] bfloat16 inference": "MiniLM, inference",
    "encoder_layers [768, 12, 3072, 8, 128] float32 inference": "2 encoder layers, inference",
    "encoder_layers [768, 12, 3072, 8, 128] bfloat16 inference": "2 encoder layers, inference",
    "int8_bert_layers [768, 12, 3072, 8, 128] float32 inference": "2 BERT layers, int8 weights",
    "minilm [4, 128] float32 training": "MiniLM, training step",
    "bert_base [8, 128] float32 inference": "BERT base, inference",
    "gpt2 [1, 64] float32 decode": "GPT-2, decoding",
    "opt_125m [4, 128] float32 training": "OPT-125m, training step",
    "t5_small [8, 128] float32 inference": "T5 small, inference",
}


def chosen(machine: Machine, limit: int) -> list[tuple[str, ReportRow]]:
    """Return at most ``limit`` rows of a machine, with labels, in the order of ROWS."""
    rows = ((label, machine.rows.get(name)) for name, label in ROWS.items())
    return [(label, row) for label, row in rows if row and row.ratio("eager")][:limit]


def shares(results: Results) -> list[tuple[Machine, list[tuple[str, ReportRow]]]]:
    """Return the rows of each machine: an equal part of BARS, and what the others leave free."""
    machines = sorted(results.machines, key=lambda m: len(chosen(m, BARS)))
    found, left = [], BARS
    for i, machine in enumerate(machines):
        rows = chosen(machine, left // (len(machines) - i))
        left -= len(rows)
        if rows:
            found.append((machine, rows))
    return found[::-1]


def heading(machine: Machine) -> str:
    """Return the title of a machine's bars: its GPU, or what tells its CPU from others."""
    cpu = mapping(machine.about.get("cpu"))
    if "gpu" in machine.about or not cpu:
        return text(machine.about.get("gpu")) or machine.name
    labels = {"name": "", "family": "family ", "model": "model ", "isa": "ISA "}
    said = [f"{label}{text(cpu[key])}" for key, label in labels.items() if cpu.get(key)]
    return ", ".join([*said, f"{text(machine.about.get('threads'))} threads"])


def figure(bars: Sequence[tuple[Machine, list[tuple[str, ReportRow]]]]) -> Figure:
    """Return the bars, one group a machine."""
    lines = sum(len(rows) + 1.3 for _, rows in bars)
    height = 0.27 * lines + 0.75
    made = Figure((7.4, height))
    made.subplots_adjust(left=0.37, right=0.9, top=1 - 0.08 / height, bottom=0.55 / height)
    ax, y = made.add_subplot(), 0.0
    ends, places, names = [1.0], [], []
    for machine, rows in bars:
        ax.text(
            -0.585,
            y,
            heading(machine),
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=9,
            fontweight="bold",
            zorder=5,
            bbox={"fc": "white", "ec": "none", "pad": 2},
        )
        for label, row in rows:
            y += 1
            ratio, span = row.ratio("eager") or 1.0, row.ratio_interval("eager")
            color = RED if ratio < 1 else BLUE if row.dtype == "float32" else LIGHT
            ax.barh(y, ratio, 0.72, color=color, zorder=2)
            ax.plot(span or (ratio, ratio), [y, y], color="black", linewidth=1, zorder=3)
            ends.append(span[1] if span else ratio)
            ax.text(
                1.02,
                y,
                f"{times(ratio)} x",
                transform=ax.get_yaxis_transform(),
                va="center",
                color=RED if ratio < 1 else "black",
            )
            places.append(y)
            names.append(f"{label}, {row.dtype}")
        y += 1.3
    ax.axvline(1, color="black", linewidth=1.2, zorder=4)
    ax.set_xlim(0, max(ends) * 1.02)
    ax.set_ylim(y - 0.55, -0.6)
    ax.set_yticks(places, names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel("torch eager's time over ours, with its 95 % interval; right of 1 ours is faster")
    return made


@styled
def save(results: Results, path: Path) -> None:
    """Write the figure; the same bytes for the same baselines."""
    metadata = {"Date": None, "Creator": None}
    figure(shares(results)).savefig(path, format="svg", metadata=metadata)
