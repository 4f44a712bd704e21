"""What benchmarks say of the machine and of the work: the rates themselves are not tested."""

import os
import subprocess
import sys
import time

import machine
import pytest
import rates
import torch
import torch.nn.functional as F

from llmos_kernels._tools import other_processes
from llmos_kernels.testing import interval


def test_others_are_seen():
    """A process that is not among those that are measured; the same one, if it is."""
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        alone = machine.Watch([os.getpid(), spinner.pid])
        watch = machine.Watch([os.getpid()])
        time.sleep(1.0)
        others, rest = watch.others(), alone.others()
    finally:
        spinner.kill()
        spinner.wait()
    assert others > 0.4 and others - rest > 0.4


def test_our_own_work_is_not_others(monkeypatch):
    times = iter([100.0, 10.0, 102.05, 11.5])
    monkeypatch.setattr(other_processes, "_all_seconds", lambda: next(times))
    monkeypatch.setattr(other_processes, "_seconds_of", lambda pid: next(times))
    watch = machine.Watch([1])
    watch._start -= 10.0
    assert watch.others() == pytest.approx(0.05, rel=0.01)


def test_busy(monkeypatch):
    shares = [0.5, 0.5, 0.01]
    monkeypatch.setattr(machine.Watch, "others", lambda _: shares.pop(0))
    assert machine.busy("cpu", 0.0).startswith("other processes take 0.50 of")
    assert machine.wait_until_idle("cpu") is None and not shares
    monkeypatch.setattr(machine.Watch, "others", lambda _: 1.0)
    assert "1.00" in machine.wait_until_idle("cpu", seconds=0.0)
    monkeypatch.setattr(machine.Watch, "others", lambda _: 0.0)
    monkeypatch.setattr(machine, "_nvidia_smi", lambda *_: ["12345"])
    assert machine.busy("cuda", 0.0) == "other processes are on the GPU: [12345]"


def test_state(monkeypatch):
    found = machine.state("cpu")
    assert found["load"] >= 0 and {"MHz", "governor"} <= found.keys()
    answer = "1980 MHz, 2619 MHz, 112.31 W, 41, 0x0000000000000000"
    monkeypatch.setattr(machine, "_nvidia_smi", lambda *_: [answer])
    assert machine.state("cuda") | {"power.draw": "112.31 W", "temperature.gpu": "41"} == (
        machine.state("cuda")
    )


def test_names_of_machines():
    """Two CPUs of one name may differ in all that counts."""
    cpu = {
        "name": "AMD EPYC",
        "vendor": "AuthenticAMD",
        "family": "25",
        "model": "17",
        "isa": "avx2",
    }
    assert machine.cpu_name(cpu, 2) == "amd-family25-model17-avx2-2threads"
    assert machine.cpu_name(cpu | {"vendor": "GenuineIntel"}, 1).startswith("intel-family25-")
    arm = {"vendor": "aarch64", "family": None, "model": None, "isa": "baseline"}
    assert machine.cpu_name(arm, 8) == "aarch64-baseline-8threads"
    here = machine.cpu()
    assert here["isa"] in machine.name("cpu") and machine.name("cpu").endswith("threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operations(dtype):
    a, b = torch.randn(3, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    assert rates.operations(lambda: F.linear(a, b)) == 2 * 3 * 5 * 7
    q, k = torch.randn(2, 4, 6, 16, dtype=dtype), torch.randn(2, 4, 9, 16, dtype=dtype)
    attend = lambda: F.scaled_dot_product_attention(q, k, k)
    assert rates.operations(attend) == 2 * 2 * 2 * 4 * 6 * 9 * 16
    assert rates.operations(lambda: a + 1) == 0


def test_share_of_limits(monkeypatch):
    """Of the nearer limit; a copy as large as what is moved is the other."""
    sizes = []
    monkeypatch.setattr(machine, "copy_rate", lambda device, size: sizes.append(size) or 10.0)
    monkeypatch.setattr(rates, "limits", lambda device: {"float32": 100.0})
    share = lambda *args: rates.share_of_limits("cpu", 1e-3, *args)
    assert share(5_000_000, None, "float32") == {"GB/s": 5.0, "share": 0.5}
    assert share(5_000_000, 80_000_000, "float32") == {
        "GB/s": 5.0,
        "FLOP": 80_000_000,
        "GFLOP/s": 80.0,
        "share": 0.8,
    }
    assert share(5_000_000, 80_000_000, "float16")["share"] == 0.5
    share(10, 0, "float32"), share(1 << 40, 0, "float32")
    assert sizes == [1 << 22] * 3 + [1 << 20, 1 << 29]


def test_interval_of_a_median():
    """Of many draws of 25 numbers, 95 % and few more have the true median between the two."""
    torch.manual_seed(0)
    drawn = [interval(row) for row in torch.rand(4000, 25).tolist()]
    inside = sum(low <= 0.5 <= high for low, high in drawn) / len(drawn)
    assert 0.94 < inside < 0.99
    assert interval([3.0, 1.0, 2.0]) == [1.0, 3.0] and interval([5.0]) == [5.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_peak(dtype, monkeypatch):
    """Every thread does all rounds, and each round as many operations."""
    monkeypatch.setattr(machine, "_rate", lambda operations, call: (operations, call()))
    once, again = machine.multiply_add_rate(dtype)
    assert once == again and once % (200_000 * torch.get_num_threads()) == 0 < once
