"""Count the work of a call, and relate its time to the machine's limits."""

import contextlib
import functools
import time
from collections.abc import Callable

import machine
import torch
from torch.utils import flop_counter

limits = functools.cache(machine.limits)

_ATEN = torch.ops.aten
# This torch lacks the op, or has a formula for it.
with contextlib.suppress(AttributeError, RuntimeError):
    flop_counter.register_flop_formula(_ATEN._scaled_dot_product_flash_attention_for_cpu)(
        lambda q, k, v, *args, **kwargs: flop_counter.sdpa_flop_count(q, k, v)
    )


def operations(fn: Callable[[], object]) -> int:
    """Return the floating-point operations of the GEMMs that ``fn`` asks of torch.

    Attention counts whole, whatever its mask hides.
    """
    with flop_counter.FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def share_of_limits(device: str, seconds: float, moved: int, flop: int | None, rate: str) -> dict:
    """Return rates, and the share of the nearer of two limits.

    One limit is a copy that moves as many bytes, from 1 MiB on, the other that of products in the
    dtype ``rate``.
    """
    found = {"GB/s": round(moved / seconds / 1e9, 2)}
    size = 1 << min(max(moved, 1 << 20), 1 << 29).bit_length() - 1
    shares = [moved / seconds / 1e9 / machine.copy_rate(device, size)]
    peak_rate = limits(device).get(rate)
    if flop:
        found |= {"FLOP": flop, "GFLOP/s": round(flop / seconds / 1e9, 1)}
        shares += [flop / seconds / 1e9 / peak_rate] if peak_rate else []
    return found | {"share": round(max(shares), 3)}


def host_seconds(fn: Callable[[], object]) -> float:
    """Return the seconds until ``fn`` returns."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start
