"""``Case``, the description of an op that tests, benchmarks, ``verify`` and ``inspect`` use."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """The description of one op with one set of options: how to call it, and on which shapes.

    ``make(shape, **options)`` returns the positional arguments of ``op``, ``reference``, ``eager``
    and ``baseline``; ``options`` are dtype, device and requires_grad.
    """

    name: str
    op: Callable
    reference: Callable
    eager: Callable  # The same in plain torch: gives the error budget.
    make: Callable[..., tuple]
    shapes: tuple  # Small and irregular, for tests.
    benchmark_shapes: tuple = ()  # Of real models, for benchmarks on CPUs.
    gpu_benchmark_shapes: tuple = ()
    baseline: Callable | None = None  # The fastest way in torch, if ``eager`` is not.
    small_shape: Callable[[int], tuple] = lambda n: (n, 3, 64)  # A small shape for each n.
    gradcheck_shape: tuple = (3, 2, 5)  # For numerical derivatives.
    multi_block_shape: tuple = (67, 129)  # Several blocks of each kernel.
    compile_widths: tuple = (64, 768, 4096, 8192, 16384, 32768)  # Last dimensions to compile for.
    row_wise: bool = True  # Each output row depends only on the same row of each input.
    any_dtype: bool = False  # It copies, and takes integers, too.

    def __str__(self) -> str:
        return self.name
