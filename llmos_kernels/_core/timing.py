"""Times of functions that are compared: measured in turn, so that what disturbs the machine disturbs all."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch


def samples(
    fns: Sequence[Callable[[], object]],
    rounds: int = 30,
    seconds: float = 4e-3,
    most: float = float("inf"),
    least: int = 5,
) -> list[list[float]]:
    """The times of each function, in seconds, all measured in turn.

    Each round runs every function for about ``seconds``, so that what disturbs the machine
    disturbs all of them alike; there are fewer rounds, at least ``least``, where all would take more
    than ``most`` seconds. On a GPU the device's work is waited for. A function in another process
    measures itself: its ``timed(calls)`` is asked.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None

    def timed(fn, calls):
        if hasattr(fn, "timed"):
            return fn.timed(calls)
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        wait()
        return (time.perf_counter() - start) / calls

    def warmed(fn):
        first = timed(fn, 1)
        return first if first > 0.25 else min(first, timed(fn, 1), timed(fn, 1))

    warm = [warmed(fn) for fn in fns]
    calls = [max(1, round(seconds / t)) for t in warm]
    within = most / sum(t * n for t, n in zip(warm, calls, strict=True))
    times: list[list[float]] = [[] for _ in fns]
    for _ in range(rounds if within >= rounds else min(rounds, max(least, int(within)))):
        for fn, n, taken in zip(fns, calls, times, strict=True):
            taken.append(timed(fn, n))
    return times


def interleaved(
    fns: Sequence[Callable[[], object]], rounds: int = 30, seconds: float = 4e-3
) -> list[float]:
    """The median time of each function, in seconds, by ``samples``."""
    return [statistics.median(t) for t in samples(fns, rounds, seconds)]


def interval(found: Sequence[float]) -> list[float]:
    """Two of the samples between which their median is to be expected, with 95 % confidence or, of fewer
    than six, all there is: order statistics, which ask nothing of how times are spread."""
    listed, n = sorted(found), len(found)
    reach = NormalDist().inv_cdf(0.975) * n**0.5 / 2
    low, high = math.floor(n / 2 - reach), math.ceil(n / 2 + reach)
    return [listed[max(low - 1, 0)], listed[min(high, n - 1)]]
