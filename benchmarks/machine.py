"""Tell which machine is measured, its limits and state, and whether other processes run."""

import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import llmos_kernels as lk
from llmos_kernels._tools import environment, other_processes
from llmos_kernels.ops._cpu_facts import model_name
from llmos_kernels.testing import interleaved


class Busy(Exception):
    """Other processes run on the machine."""


class Watch(other_processes.Watch):
    """A watch, from now on, of all processes but those named."""

    def disturbed_on(self, device: str) -> str | None:
        """Return why the measurement since the start was disturbed, or None."""
        if (why := self.disturbed()) is not None:
            return why
        if device == "cuda":
            pids = {int(p) for p in _nvidia_smi("pid", "compute-apps") if p.strip().isdigit()}
            if pids.difference(self._pids):
                return f"other processes are on the GPU: {sorted(pids.difference(self._pids))}"
        return None


def _nvidia_smi(query: str, of: str = "gpu") -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-{of}={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def busy(device: str, seconds: float = 0.5) -> str | None:
    """Return why a measurement would be disturbed, or None."""
    watch = Watch([os.getpid()])
    time.sleep(seconds)
    return watch.disturbed_on(device)


def wait_until_idle(device: str, seconds: float = 20.0) -> str | None:
    """Return None as soon as nothing else runs; after so many seconds, what does."""
    end = time.monotonic() + seconds
    while (why := busy(device)) is not None:
        if time.monotonic() > end:
            return why
    return None


def state(device: str) -> dict:
    """Return load, clocks and governor; of a GPU clocks, power and temperature."""
    info = Path("/proc/cpuinfo")
    clocks = [
        float(line.split(":")[1])
        for line in (info.read_text().splitlines() if info.exists() else ())
        if line.startswith("cpu MHz")
    ]
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    found = {
        "load": round(os.getloadavg()[0], 2),
        "MHz": round(sum(clocks) / len(clocks)) if clocks else None,
        "governor": governor.read_text().strip() if governor.exists() else None,
    }
    if device == "cuda":
        query = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
        for line in _nvidia_smi(query)[:1]:
            found |= dict(zip(query.split(","), map(str.strip, line.split(",")), strict=True))
    return found


def _rate(operations: float, *calls) -> float:
    return operations / min(interleaved(calls, rounds=15, seconds=0.02)) / 1e9


def cpu() -> dict:
    """Return what tells one kind of CPU from another; its name in /proc/cpuinfo often does not."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""

    def first(field: str) -> str | None:
        found = re.search(rf"^{field}\s*: (.*)", text, re.MULTILINE)
        return found[1] if found else None

    extension = environment._extension()
    return {
        "name": model_name() or platform.machine(),
        "vendor": first("vendor_id") or platform.machine(),
        "family": first("cpu family"),
        "model": first("model"),
        "isa": extension.cpu_level() if extension else "reference",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def hardware(device: str) -> dict:
    """Return the CPU and, if it is measured, the GPU."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return gpu | {"cpu": cpu()}


def cpu_name(about: dict, threads: int) -> str:
    """Return the file name of a kind of CPU: vendor, family, model, ISA and threads."""
    vendor = re.sub(r"\W+|^(authentic|genuine)", "", about["vendor"].lower())
    numbers = [f"{key}{about[key]}" for key in ("family", "model") if about[key] is not None]
    return "-".join([vendor, *numbers, about["isa"], f"{threads}threads"])


def name(device: str) -> str:
    """Return the name of this kind of machine, as a file's: the GPU's, or that of the CPU."""
    if device == "cuda":
        return re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    return cpu_name(cpu(), torch.get_num_threads())


@functools.cache
def copy_rate(device: str, size: int) -> float:
    """Return the GB/s, read and written, of copies that move so many bytes each.

    Small copies measure the caches.
    """
    source = torch.ones(max(size // 8, 1), device=device)
    target = torch.empty_like(source)
    return round(_rate(2 * source.nbytes, lambda: target.copy_(source)), 1)


def multiply_add_rate(dtype: torch.dtype) -> float:
    """Return the GFLOP/s of multiply-adds in registers on torch's threads: the peak of a CPU.

    The instruction is the one with which our kernels multiply ``dtype`` at the ISA in use.

    Args:
        dtype: float32, bfloat16 or int8.
    """
    library = ctypes.CDLL(str(Path(lk.__file__).with_name("_ops_cpu.so")))
    run = library.llmos_multiply_adds
    run.restype, run.argtypes = ctypes.c_int64, [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    number = (torch.float32, torch.bfloat16, torch.int8).index(dtype)
    rounds, threads = 200_000, torch.get_num_threads()
    call = functools.partial(run, number, rounds, threads)
    return _rate(call(), call)


def limits(device: str) -> dict[str, float]:
    """Return the rates that this machine reaches: a large copy in GB/s, products in GFLOP/s.

    A product's is that of a large GEMM, torch's or ours, or on a CPU that of multiply-adds in
    registers, whichever is highest, by dtype.
    """
    large, n = (2**31, 8192) if device == "cuda" else (2**29, 2048)
    found = {"copy": copy_rate(device, large)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if device == "cpu" and dtype == torch.float16:
            continue  # No CPU kernel multiplies float16 as such.
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        calls = (lambda a=a, b=b: F.linear(a, b)), (lambda a=a, b=b: lk.linear(a, b))
        found[str(dtype).removeprefix("torch.")] = _rate(2.0 * n**3, *calls)
    a, b = (torch.ones(n, n, dtype=torch.int8, device=device) for _ in range(2))
    scale, packed = torch.ones(n, device=device), lk.int8_vnni_weight(b)
    ours = lambda: lk.int8_matmul(a, b, scale, scale, vnni_weight=packed)
    found["int8"] = _rate(2.0 * n**3, lambda: torch._int_mm(a, b.mT), ours)
    if device == "cpu":
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            name = str(dtype).removeprefix("torch.")
            found[name] = max(found[name], multiply_add_rate(dtype))
    return {k: round(v, 1) for k, v in found.items()}
