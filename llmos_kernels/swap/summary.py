"""The report of ``optimize``: what became of each module, as data, as a summary and as a table."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llmos_kernels.swap.timing import Timing, span


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return ``rows`` as text in columns. The first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


@dataclass(frozen=True)
class Entry:
    """One module that ``optimize`` looked at.

    Args:
        module: its name in the model; empty for the model itself.
        cls: its class before the swap.
        swapped: whether it was swapped.
        reason: why it was kept; or "not verified".
        error: the largest error of the drop-in over its budget; 1 or less passes. None: not proved.
        timings: times of the original and of the drop-in, for each number of rows.
        slower: whether the drop-in is right, and the module was kept only because it is slower
            here.
        sites: what was found inside of the module's own forward, with file and line.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64))
        >>> (entry,) = llmos_kernels.optimize(model, verify=False).entries
        >>> entry.module, entry.cls, entry.swapped, entry.reason
        ('0', 'LayerNorm', True, 'not verified')
    """

    module: str
    cls: str
    swapped: bool
    reason: str = ""
    error: float | None = None
    timings: tuple[Timing, ...] = ()
    slower: bool = False
    sites: tuple[str, ...] = ()

    @property
    def speedup(self) -> float | None:
        """The smallest speedup of all timings; None where there are none."""
        return min((t.speedup for t in self.timings), default=None)


@dataclass(frozen=True)
class Padding:
    """A model that was asked to skip its padding.

    Args:
        module: its name in the model; empty for the model itself.
        cls: its class.
        skipped: whether it computes tokens alone.
        reason: why it computes padding.
        fill: which part of the positions of ``inputs`` are tokens; None where they do not say.
        error: the largest error over its budget, of outputs at tokens and of gradients. None: not
            proved.
        timings: times of the model with padding and without it, other swaps included.
        slower: whether it is right, and computes padding only because that is faster here.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64))
        >>> print(llmos_kernels.optimize(model, skip_padding=True).padding[0])
        Sequential computes padding: it has no encoder of transformers or torch
    """

    module: str
    cls: str
    skipped: bool = False
    reason: str = ""
    fill: float | None = None
    error: float | None = None
    timings: tuple[Timing, ...] = ()
    slower: bool = False

    @property
    def is_wrong(self) -> bool:
        """Whether padding is computed for another reason than speed."""
        return not self.skipped and not self.slower

    def __str__(self) -> str:
        name = f"{self.cls}{f' ({self.module})' * bool(self.module)}"
        full = "" if self.fill is None else f", {self.fill:.0%} of the positions are tokens"
        if not self.skipped:
            return f"{name} computes padding{full}: {self.reason}"
        names = ("a step" if t.backward else "the model" for t in self.timings)
        times = (f"{span(t.before, t.after)} ({t.speedup:.2f}x)" for t in self.timings)
        shown = map(" ".join, zip(names, times, strict=True))
        return f"{name} skips padding{full}{': ' * bool(self.timings)}{', '.join(shown)}"


@dataclass
class Report:
    """Every module that ``optimize`` looked at.

    ``print(report)`` summarises them by class, ``print(report.details())`` has a line for each.

    Args:
        entries: the modules.
        model: times of the whole model before and after, where ``inputs`` were given.
        why_no_model: why the whole model could not be timed although they were given.
        frozen_weights: how many weights have a packed copy; None unless ``freeze_weights`` was
            asked for.
        frozen_bytes: the memory of these copies.
        padding: the models that were asked to skip their padding; empty unless ``skip_padding``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Dropout())
        >>> report = llmos_kernels.optimize(model, verify=False)
        >>> [entry.module for entry in report.swapped], report.kept
        (['0'], [])
    """

    entries: list[Entry] = field(default_factory=list)
    model: list[Timing] = field(default_factory=list)
    why_no_model: str = ""
    frozen_weights: int | None = None
    frozen_bytes: int = 0
    padding: list[Padding] = field(default_factory=list)

    @property
    def swapped(self) -> list[Entry]:
        """The modules that were swapped."""
        return [e for e in self.entries if e.swapped]

    @property
    def kept(self) -> list[Entry]:
        """The modules that stayed as they were; ``reason`` says why."""
        return [e for e in self.entries if not e.swapped]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return asdict(self)

    def details(self) -> str:
        """Return a table with a line for each module: result, reason, error and times."""
        rows = [("module", "class", "result", "error/budget", "speedup", "rows: before -> after")]
        rows += [
            (
                e.module or "(the model)",
                e.cls,
                f"swapped{', ' * bool(e.reason)}{e.reason}" if e.swapped else f"kept: {e.reason}",
                "" if e.error is None else f"{e.error:.2f}",
                "" if e.speedup is None else f"{e.speedup:.2f}x",
                "; ".join(map(str, e.timings)),
            )
            for e in self.entries
        ]
        return "\n".join([table(rows), *self.sites(), *self._last_lines()])

    def sites(self) -> list[str]:
        """Return a line for each place in a forward that was found, with file and line.

        Example:
            >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64))
            >>> llmos_kernels.optimize(model, verify=False).sites()  # It has no code of its own.
            []
        """
        lines = []
        for e in self.entries:
            for site in e.sites:
                what, colon, rest = site.partition(": ")
                if not colon:
                    what, colon, rest = site.partition(" at ")
                kept = "" if e.swapped else ", kept"
                lines.append(f"{what} in {e.module or 'the model'}{colon}{rest}{kept}")
        return lines

    def __str__(self) -> str:
        rows = [("class", "swapped", "kept", "error/budget", "speedup")]
        whys: dict[tuple[str, str], int] = {}
        for cls in dict.fromkeys(e.cls for e in self.entries):
            same = [e for e in self.entries if e.cls == cls]
            swapped = [e for e in same if e.swapped]
            errors = [e.error for e in swapped if e.error is not None]
            speedups = [e.speedup for e in swapped if e.speedup is not None]
            rows.append(
                (
                    cls,
                    str(len(swapped)),
                    str(len(same) - len(swapped)),
                    f"{max(errors):.2f}" if errors else "",
                    _range(speedups) if speedups else "",
                )
            )
            for e in same:
                if not e.swapped:
                    whys[cls, e.reason] = whys.get((cls, e.reason), 0) + 1
        reasons = [f"kept {n} {cls}: {why}" for (cls, why), n in whys.items()]
        if any(e.swapped and e.error is None for e in self.entries):
            reasons.append("nothing was proved or timed (verify=False)")
        return "\n".join([table(rows), *reasons, *self._last_lines()])

    def _last_lines(self) -> Iterator[str]:
        unchanged = "" if self.swapped or self.frozen_weights else ": the model is as it was"
        yield f"{len(self.swapped)} swapped, {len(self.kept)} kept{unchanged}"
        for t in self.model:
            what = "a step of the model, forward and backward" if t.backward else "the model"
            yield f"{what}: {span(t.before, t.after)} ({t.speedup:.2f}x)"
        yield from map(str, self.padding)
        if self.frozen_weights:
            mib = self.frozen_bytes / 2**20
            yield f"packed copies of {self.frozen_weights} weights: {mib:.1f} MiB"
        elif self.frozen_weights == 0:
            yield "no packed copies: no encoder layer runs as one op"
        if self.why_no_model:
            yield f"the model could not be timed: {self.why_no_model}"


def _range(values: Sequence[float]) -> str:
    low, high = (f"{v:.2f}x" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
