"""What ``optimize`` did to each module, as data and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Text in columns; the first row is their heads."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


@dataclass(frozen=True)
class Entry:
    """One module. ``error`` is the largest error over its budget, ``speedup`` old time over new."""

    module: str
    cls: str
    swapped: bool
    reason: str = ""
    error: float | None = None
    speedup: float | None = None


@dataclass
class Report:
    """Every module that ``optimize`` looked at. ``print(report)`` shows it as a table."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def swapped(self) -> list[Entry]:
        """The modules that were swapped."""
        return [e for e in self.entries if e.swapped]

    @property
    def kept(self) -> list[Entry]:
        """The modules that stayed as they were; ``reason`` says why."""
        return [e for e in self.entries if not e.swapped]

    def to_dict(self) -> dict:
        """The same as plain data, for JSON."""
        return {"entries": [asdict(e) for e in self.entries]}

    def __str__(self) -> str:
        rows = [("module", "class", "result", "error/budget", "speedup")]
        rows += [
            (
                e.module or "(the model)",
                e.cls,
                "swapped" if e.swapped else f"kept: {e.reason}",
                "" if e.error is None else f"{e.error:.2f}",
                "" if e.speedup is None else f"{e.speedup:.2f}x",
            )
            for e in self.entries
        ]
        return f"{table(rows)}\n{len(self.swapped)} swapped, {len(self.kept)} kept"
