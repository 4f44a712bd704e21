"""What one op adds to tests, benchmarks, ``verify`` and ``inspect``."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """How to call one op. ``make(shape, **options)`` returns its positional arguments."""

    name: str
    op: Callable
    reference: Callable
    eager: Callable  # What is written with torch alone: the error budget and the benchmark.
    make: Callable[..., tuple]
    shapes: tuple  # Small and awkward: tests.
    sizes: tuple = ()  # Of real models: benchmarks.
    gpu_sizes: tuple = ()
    rival: Callable | None = None  # torch's fastest way, where eager is written to be compared.
    sized: Callable[[int], tuple] = lambda n: (n, 3, 64)  # A small shape for each n.
    tiny: tuple = (3, 2, 5)  # For numerical derivatives.
    medium: tuple = (67, 129)  # Several blocks of each kernel.
    widths: tuple = (64, 768, 4096, 8192, 16384, 32768)  # Last dimensions to compile kernels for.
    row_wise: bool = True  # A row of the output is made of that row of each input.

    def __str__(self) -> str:
        return self.name
