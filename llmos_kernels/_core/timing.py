"""Timing of functions to compare: they run in turn, so that disturbances affect all alike."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import torch


def samples(
    fns: Sequence[Callable[[], object]],
    rounds: int = 30,
    seconds: float = 4e-3,
    max_seconds: float = float("inf"),
    min_rounds: int = 5,
    enough: Callable[[list[list[float]]], bool] | None = None,
) -> list[list[float]]:
    """Return the seconds per call of each function, one sample a round.

    Each sample waits for the GPU, if CUDA is in use. A function that runs in another process has a
    method ``timed(calls)``, which measures it instead.

    Args:
        fns: the functions to compare.
        rounds: how many samples to take of each function.
        seconds: how long one sample of one function lasts, about.
        max_seconds: the time for all rounds; there are fewer rounds if they would exceed it.
        min_rounds: the least number of rounds, whatever ``max_seconds`` says.
        enough: asked after each round from ``min_rounds`` on, with what would be returned; that
            round is the last if it answers True.

    Returns:
        For each function its samples, in seconds.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None

    def timed(fn: Any, calls: int) -> float:
        if hasattr(fn, "timed"):
            return fn.timed(calls)
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        wait()
        return (time.perf_counter() - start) / calls

    def warm_up(fn: Any) -> float:
        first = timed(fn, 1)
        return first if first > 0.25 else min(first, timed(fn, 1), timed(fn, 1))

    warm = [warm_up(fn) for fn in fns]
    calls = [max(1, round(seconds / t)) for t in warm]
    affordable = max_seconds / sum(t * n for t, n in zip(warm, calls, strict=True))
    if affordable < rounds:
        rounds = min(rounds, max(min_rounds, int(affordable)))
    times: list[list[float]] = [[] for _ in fns]
    for i in range(rounds):
        for fn, n, taken in zip(fns, calls, times, strict=True):
            taken.append(timed(fn, n))
        if enough and i + 1 >= min_rounds and enough(times):
            break
    return times


def interleaved(
    fns: Sequence[Callable[[], object]], rounds: int = 30, seconds: float = 4e-3
) -> list[float]:
    """Return the median seconds per call of each function, measured by ``samples``.

    Args:
        fns: the functions to compare.
        rounds: how many samples to take of each function.
        seconds: how long one sample of one function lasts, about.

    Returns:
        For each function the median of its samples, in seconds.
    """
    return [statistics.median(t) for t in samples(fns, rounds, seconds)]


def interval(found: Sequence[float]) -> list[float]:
    """Return [low, high]: two of the samples that enclose the true median with 95 % confidence.

    The bounds are order statistics, which assume nothing about the distribution of times. Of fewer
    than six samples they are the smallest and the largest, with less confidence.

    Args:
        found: samples of one function.

    Returns:
        The two bounds, in the unit of the samples.
    """
    ordered, n = sorted(found), len(found)
    reach = NormalDist().inv_cdf(0.975) * n**0.5 / 2
    low, high = math.floor(n / 2 - reach), math.ceil(n / 2 + reach)
    return [ordered[max(low - 1, 0)], ordered[min(high, n - 1)]]
