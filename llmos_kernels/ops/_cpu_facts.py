"""What this CPU and this torch are, as far as the speed of matrix products depends on it."""

import functools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__: list[str] = []

ONEDNN, MKL, ATEN = "onednn", "mkl", "aten"

#: The probe multiplies matrices of this shape and its reverse, at most so often. The product is so
#: narrow that every library computes it on one thread: other processes disturb single calls alone.
_PROBE_SHAPE, _PROBE_CALLS = (32, 1024), 5
#: In 16 bits a library takes at most so many times as long as in float32: oneDNN 1.5 to 3 times,
#: also where it has to emulate bfloat16. torch's plain loop takes more than 30 times as long.
_PROBE_FACTOR = 10


class Cpu(NamedTuple):
    """The properties of a CPU and of its torch that measurements and rules are matched with."""

    vendor: str | None  # As CPUID spells it: GenuineIntel, AuthenticAMD.
    family: int | None
    isa: str  # The instruction set that our kernels use; "none" without the extension.
    amx: bool  # Whether the CPU has AMX, which oneDNN uses whatever our kernels do.
    torch_isa: str  # The instruction set that torch's own kernels use, as torch spells it.
    mkl: bool


def _of_cpuinfo(field: str) -> str | None:
    """Return a field of the first CPU in /proc/cpuinfo, or None."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(rf"^{field}\s*: (.*)$", text, re.MULTILINE)
    return found and found[1].strip()


def model_name() -> str | None:
    """Return the model name of the CPU, or None where the system does not say."""
    return _of_cpuinfo("model name")


@functools.cache
def cpu() -> Cpu:
    """Return what this CPU and this torch are, as seen when the first product asks."""
    extension = sys.modules.get("llmos_kernels._C")
    family = _of_cpuinfo("cpu family")
    intel = extension and extension.is_intel()
    return Cpu(
        "GenuineIntel" if intel else _of_cpuinfo("vendor_id"),
        int(family) if family else None,
        extension.cpu_level() if extension else "none",
        torch.cpu._is_amx_tile_supported(),
        torch.backends.cpu.get_cpu_capability(),
        torch.backends.mkl.is_available(),
    )


def _least_seconds(call: Callable[[], object], enough: float = 0.0) -> float:
    """Return the least time of a few calls; the first that takes at most ``enough`` is the last."""
    call()
    least = float("inf")
    for _ in range(_PROBE_CALLS):
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
        if least <= enough:
            break
    return least


@functools.cache
def is_onednn_product(dtype: torch.dtype, onednn_enabled: bool) -> bool:
    """Return True if oneDNN computes torch's CPU products of ``dtype``, bfloat16 or float16.

    A small product is timed, once a process, dtype and state of ``torch.backends.mkldnn.enabled``,
    for milliseconds at most: which CPUs and dtypes have one differs between versions of torch.
    """
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear is None or not torch.backends.mkldnn.is_available():
        return False
    # No mode of the caller sees the probe, or changes it.
    with (
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        shapes = _PROBE_SHAPE, _PROBE_SHAPE[::-1]
        factors = [torch.ones(n, device="cpu", dtype=torch.float32) for n in shapes]
        a, b = (f.to(dtype) for f in factors)
        try:
            linear(a, a, None, "none", [], "")
        except RuntimeError:
            return False
        allowed = _PROBE_FACTOR * _least_seconds(lambda: factors[0] @ factors[1])
        return _least_seconds(lambda: a @ b, allowed) <= allowed


def torch_library(dtype: torch.dtype, onednn_enabled: bool = True) -> str:
    """Return which library computes torch's CPU products of ``dtype``; ATEN is a plain loop."""
    if dtype in (torch.bfloat16, torch.float16):
        return ONEDNN if is_onednn_product(dtype, onednn_enabled) else ATEN
    return MKL if cpu().mkl and dtype in (torch.float32, torch.float64) else ATEN
