"""Judge the providers of one row, then time them in turn.

A test builds a Row; ``measure`` returns each provider's samples and figures. A provider whose
result is wrong, or that fails, has no time but a reason.
"""

import contextlib
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import machine
import rates
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llmos_kernels._tools import device_time
from llmos_kernels.testing import error_over_budget, interval, samples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: The largest error allowed: over its budget for ours, and for others, who may add in another
#: order; over the norm of the result for int8.
OURS, THEIRS, INT8 = 1.0, 4.0, 0.03


@dataclass
class Call:
    """One provider's call.

    ``copies`` are the same call on other inputs, which a GPU runs in turn; ``about`` has the error
    of the result against float64, and what else is recorded.
    """

    run: Callable[[], object]
    copies: Sequence[Callable[[], object]] = ()
    about: dict = field(default_factory=dict)

    @property
    def wrong(self) -> str | None:
        """Return why a time would say nothing, or None."""
        if self.about.get("relative_error", 0.0) > self.about.get("relative_limit", INT8):
            return f"relative error {self.about['relative_error']:.3g}"
        limit = OURS if self.about.get("ours") else THEIRS
        if self.about.get("error_over_budget", 0.0) > limit:
            return f"error {self.about['error_over_budget']:.3g} times its budget"
        return None


@dataclass
class Row:
    """One piece of work that providers are compared on.

    ``moved`` are the bytes that a call must move, ``flop`` the operations that it must do,
    ``goals`` the ratios to other providers that the project set out to reach.
    """

    op: str
    size: Sequence[int]
    dtype: torch.dtype
    direction: str
    moved: int
    flop: int | None = None
    goals: dict[str, float] = field(default_factory=dict)
    tokens: int | None = None
    #: The dtype whose GEMM rate ``flop`` is held against, if it is not ``dtype``.
    rate: str | None = None
    calls: dict[str, Call] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    gradients: bool = False
    #: The processes that compute for this row.
    pids: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        size = f" {list(self.size)}" if self.size else ""
        return f"{self.op}{size} {str(self.dtype)[6:]} {self.direction}"

    def add(self, provider: str, build: Callable[[], Call | None]) -> None:
        """Add a provider's call, or why it has no time; nothing if it cannot give the same result.

        An error of ours is raised.
        """
        try:
            call = build()
        except Exception as e:
            if provider == "kernel":
                raise
            lines = f"{type(e).__name__}: {e}".splitlines()
            self.wrong[provider] = lines[0][:300]
            return
        if call is None:
            return
        call.about["ours"] = provider == "kernel"
        if call.wrong is None:
            self.calls[provider] = call
        else:
            self.wrong[provider] = call.wrong


def worst(found: dict[str, Tensor], exact: dict[str, Tensor], eager: dict[str, Tensor]) -> dict:
    """Return the largest error over budget of named results."""
    errors = [error_over_budget(v, exact[k], eager[k]) for k, v in found.items()]
    return {"error_over_budget": round(max(errors), 3)}


def relative(actual: Tensor, exact: Tensor, limit: float = INT8) -> dict:
    """Return the error over the norm of the result, for int8, which no budget of roundings fits.

    Args:
        actual: the result.
        exact: what it should be.
        limit: the largest error allowed.
    """
    error = ((actual.double() - exact).norm() / exact.norm()).item()
    return {"relative_error": round(error, 5), "relative_limit": limit}


def peak_bytes(fn: Callable[[], object]) -> int:
    """Return the most memory that ``fn`` holds at a time, allocated through torch."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        fn()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def _on_gpu(calls: dict[str, Call], rounds: int) -> tuple[dict[str, list[float]], dict]:
    """Return samples of each call's time on the device from a cold cache, and the host's time.

    Calls are CUDA graphs; a call that cannot be captured runs on the stream.
    """
    ready, details = {}, {}
    for provider, call in calls.items():
        turns = [call.run, *call.copies]
        try:
            ready[provider] = device_time.captured(turns).replay, len(turns)
            details[provider] = {"timed": "graph"}
        except RuntimeError:
            torch.cuda.synchronize()

            def eagerly(turns=turns):
                for turn in turns:
                    turn()

            eagerly()
            ready[provider] = eagerly, len(turns)
            details[provider] = {"timed": "stream"}
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            times.append(rates.host_seconds(call.run))
        details[provider]["launch_us"] = round(statistics.median(times) * 1e6, 2)
    found: dict[str, list[float]] = {provider: [] for provider in calls}
    for i in range(rounds + 2):
        for provider, (work, count) in ready.items():
            taken = device_time.seconds(work) / count
            if i >= 2:
                found[provider].append(taken)
    return found, details


def times(row: Row, rounds: int, max_seconds: float) -> tuple[dict[str, list[float]], dict]:
    """Return samples of every provider, taken in turn."""
    if DEVICE == "cuda":
        return _on_gpu(row.calls, rounds)
    runs = [c.run for c in row.calls.values()]
    return dict(zip(row.calls, samples(runs, rounds, max_seconds=max_seconds), strict=True)), {}


def measure(row: Row, rounds: int, max_seconds: float, busy: bool) -> dict[str, dict]:
    """Return samples and figures of each provider, or why it has none."""
    inside = contextlib.nullcontext() if row.gradients else torch.inference_mode()
    with inside:
        peaks = {
            k: {"peak_bytes": peak_bytes(c.run)}
            for k, c in row.calls.items()
            if not hasattr(c.run, "timed")
        }
        watch = machine.Watch([os.getpid(), *row.pids])
        found, details = times(row, rounds, max_seconds)
        if not busy and (why := watch.disturbed_on(DEVICE)) is not None:
            why = machine.wait_until_idle(DEVICE)
            watch = machine.Watch([os.getpid(), *row.pids])
            found, details = times(row, rounds, max_seconds)
            why = why or watch.disturbed_on(DEVICE)
            if why is not None:
                raise machine.Busy(f"not measured: {why} (--busy measures all the same)")
    about = {"row": row.name, "op": row.op, "size": list(row.size), "bytes": row.moved}
    dtype = str(row.dtype)[6:]
    about |= {"dtype": dtype, "direction": row.direction}
    # int8 layers take and give floats: their roofline is that of int8.
    about |= {"products": row.rate} if row.rate else {}
    measured: dict[str, dict] = {k: {"row": row.name, "wrong": why} for k, why in row.wrong.items()}
    for provider, taken in found.items():
        call = row.calls[provider]
        median = statistics.median(taken)
        extra = about | {"provider": provider, "us": round(median * 1e6, 2)} | call.about
        extra |= rates.share_of_limits(DEVICE, median, row.moved, row.flop, row.rate or dtype)
        extra |= {"median_ci": interval(taken)}
        extra |= peaks.get(provider, {}) | details.get(provider, {})
        if row.tokens is not None:
            extra["tokens/s"] = round(row.tokens / median, 1)
        if "eager" in found:
            ratios = [a / b for a, b in zip(found["eager"], taken, strict=True)]
            extra["vs_eager"] = round(statistics.median(ratios), 3)
            extra["vs_eager_ci"] = [round(r, 3) for r in interval(ratios)]
        if provider == "kernel" and row.goals:
            extra["goal"] = {k: v for k, v in row.goals.items() if k in found}
        del extra["ours"]
        measured[provider] = {"samples": taken, "extra": extra}
    return measured
