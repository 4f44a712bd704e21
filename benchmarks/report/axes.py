"""The style, colours and axes that all plots of the report share, and figures as SVG."""

import functools
import io
import math
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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


def short(name: str, length: int) -> str:
    """Return a name cut to a length, which a legend or a tick accepts."""
    cut = name if len(name) <= length else f"{name[: length - 1]}…"
    return f" {cut}" if cut.startswith("_") else cut


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


def log_axis(ax: Axes, axis: str, low: float, high: float) -> None:
    """Make an axis logarithmic, from ``low`` to ``high``."""
    of = ax.xaxis if axis == "x" else ax.yaxis
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
    (ax.set_xlim if axis == "x" else ax.set_ylim)(low, high)
    of.set_major_locator(FixedLocator(_ticks(low, high)))
    of.set_minor_locator(NullLocator())
    of.set_major_formatter(FuncFormatter(_plain))
    of.grid(color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)


def framed(width: float, height: float, edges: tuple[float, float, float, float]) -> Figure:
    """Return a figure with margins in inches: left, right, top, bottom."""
    figure = Figure((width, height))
    left, right, top, bottom = edges
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure


def svg(figure: Figure, prefix: str, label: str) -> str:
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
