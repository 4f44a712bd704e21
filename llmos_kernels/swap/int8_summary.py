"""The report of ``quantize``: the layers, their errors, times and sizes."""

from dataclasses import asdict, dataclass, field
from typing import Any

from llmos_kernels.swap.summary import table


@dataclass(frozen=True)
class Int8Entry:
    """One layer that ``quantize`` looked at.

    Args:
        module: its name in the model; empty for the model itself.
        cls: its class before.
        quantized: whether it is int8 now.
        reason: why it was kept.
        error: the norm of the error of its results over the norm of the results.
        speedups: the time of the original over that of int8, for each number of rows.
        before: the size of its weights in bytes.
        after: the size of the int8 weights and scales in bytes.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512))
        >>> (entry,) = llmos_kernels.quantize(model, always=True).entries
        >>> entry.module, entry.cls, entry.quantized, entry.before, entry.after
        ('0', 'Linear', True, 1048576, 264192)
    """

    module: str
    cls: str
    quantized: bool
    reason: str = ""
    error: float | None = None
    speedups: dict[int, float] = field(default_factory=dict)
    before: int = 0
    after: int = 0


@dataclass
class Int8Report:
    """Every linear layer that ``quantize`` looked at. ``print(report)`` shows it as a table.

    Args:
        entries: the layers.
        before: the size of all parameters and buffers of the model before, in bytes.
        after: their size after it.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU())
        >>> report = llmos_kernels.quantize(model, skip=("0",))
        >>> report.quantized, [entry.reason for entry in report.kept]
        ([], ['skip names it'])
    """

    entries: list[Int8Entry]
    before: int
    after: int

    @property
    def quantized(self) -> list[Int8Entry]:
        """The layers that are int8 now."""
        return [e for e in self.entries if e.quantized]

    @property
    def kept(self) -> list[Int8Entry]:
        """The layers that stayed as they were; ``reason`` says why."""
        return [e for e in self.entries if not e.quantized]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("module", "class", "result", "error", "speedup by rows", "size")]
        rows += [
            (
                e.module or "(the model)",
                e.cls,
                "int8" if e.quantized else f"kept: {e.reason}",
                "" if e.error is None else f"{e.error:.2%}",
                ", ".join(f"{rows}: {s:.2f}x" for rows, s in e.speedups.items()),
                f"{_mib(e.before)} -> {_mib(e.after)}" if e.quantized else "",
            )
            for e in self.entries
        ]
        size = f"{_mib(self.before)} -> {_mib(self.after)}"
        return f"{table(rows)}\n{len(self.quantized)} int8, {len(self.kept)} kept, {size}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
