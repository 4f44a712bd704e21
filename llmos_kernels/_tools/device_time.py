"""What a GPU takes for calls whose inputs its caches do not hold; for ``tune`` and the benchmarks."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _copy(a):
    if not isinstance(a, Tensor):
        return a
    other = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
    return other.copy_(a.detach()).requires_grad_(a.requires_grad)


def cold(args: tuple) -> list[tuple]:
    """The arguments, and copies of them with the same strides: together twice the L2 cache or more, so
    that each of calls in turn finds its own cold."""
    size = sum(a.nbytes for a in args if isinstance(a, Tensor))
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    count = min(max(math.ceil(2 * cache / max(size, 1)), 2), 64)
    return [args, *(tuple(map(_copy, args)) for _ in range(count - 1))]


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of all the calls in turn; the first runs once before, and compiles."""
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def seconds(work: Callable[[], object]) -> float:
    """The device's time from the start of ``work`` to its end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
