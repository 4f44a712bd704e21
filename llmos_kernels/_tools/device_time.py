"""Measure the time of GPU calls whose inputs are not in the L2 cache."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _copy(a: Any) -> Any:
    """Return a copy of a tensor with the same strides; anything else unchanged."""
    if not isinstance(a, Tensor):
        return a
    other = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
    return other.copy_(a.detach()).requires_grad_(a.requires_grad)


def cold(args: tuple) -> list[tuple]:
    """Return the arguments and copies of them, together at least twice the size of the L2 cache.

    When calls take the entries in turn, each call finds its inputs outside the L2 cache. At most 64
    are made.
    """
    size = sum(a.nbytes for a in args if isinstance(a, Tensor))
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    count = min(max(math.ceil(2 * cache / max(size, 1)), 2), 64)
    return [args, *(tuple(map(_copy, args)) for _ in range(count - 1))]


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of all calls in turn. The first call runs once beforehand, to compile."""
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that the GPU takes for ``work``, measured by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
