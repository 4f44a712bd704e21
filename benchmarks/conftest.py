"""Run one benchmark a test, with ``provider`` as its innermost parameter.

The providers of a row are timed in turn. The first test of a row builds and measures it for all
selected providers, and each test gives its own samples to pytest-benchmark, whose flags work as
usual (``--benchmark-json``, ``-compare``, ``-compare-fail``). ``make bench`` pins the threads.
"""

import contextlib
import fnmatch
import os
import platform

import machine
import peers
import progress
import pytest
import rates
import rows
import torch
from saved_rows import SavedRows

DEVICE = rows.DEVICE
#: The providers of ``--quick``.
QUICK = ("kernel", "eager")


def pytest_addoption(parser):
    group = parser.getgroup("llmos_kernels")
    some = {"action": "append", "default": [], "metavar": "NAME"}
    names = {**some, "type": lambda text: text.split(",")}
    group.addoption("--op", **names, help="rows of these ops or models; * stands for anything")
    group.addoption("--providers", **names, help="these alone, of those that can be had")
    group.addoption("--dtypes", **names, help="float32, bfloat16")
    group.addoption("--directions", **names, help="forward, backward, inference, training, ...")
    group.addoption("--quick", action="store_true", help="one size of each op, ours and eager")
    group.addoption("--resume", metavar="FILE", help="keep rows there; what it has is not measured")
    group.addoption(
        "--progress", action="store_true", help="a bar with the time left, on a terminal"
    )
    group.addoption("--busy", action="store_true", help="measure though other processes run")


def row_key(item) -> str:
    """Return what the tests of one row have in common: everything but the provider."""
    params = [f"{k}={v}" for k, v in item.callspec.params.items() if k != "provider"]
    return f"{item.path.name}::{item.originalname}[{', '.join(params)}]"


class Session:
    """The rows of a run: the providers that each is measured for, and the results."""

    def __init__(self, config):
        self.config, self.wanted, self.found = config, {}, {}
        self.quick = config.getoption("quick")
        self.saved = SavedRows(config.getoption("resume"), about() | {"quick": self.quick})
        self.checked, self.bar = False, progress.Silent()

    def chosen(self, item) -> bool:
        """Return True if the flags select a test."""
        params = getattr(item, "callspec", None) and item.callspec.params
        if not params or "provider" not in params:
            return True
        if self.quick:
            providers = self.config.getoption("providers")
            if item.get_closest_marker("quick") is None:
                return False
            if not providers and params["provider"] not in QUICK:
                return False
        for flag, name in (
            ("op", "op"),
            ("providers", "provider"),
            ("dtypes", "dtype"),
            ("directions", "direction"),
        ):
            patterns = [p for some in self.config.getoption(flag) for p in some]
            if patterns and not any(fnmatch.fnmatch(params[name], p) for p in patterns):
                return False
        return True

    def measured(self, item, build) -> dict:
        """Return the results of the item's row, for all selected providers."""
        key = row_key(item)
        if key not in self.found:
            wanted = self.wanted[key]
            self.found[key] = self.saved.get(key, wanted) or self._measure(key, wanted, build)
            self.bar.row(key)
        return self.found[key]

    def _measure(self, key, wanted, build) -> dict:
        busy = self.config.getoption("busy")
        if not busy and not self.checked:
            why = machine.wait_until_idle(DEVICE)
            if why is not None:
                raise machine.Busy(f"not measured: {why} (--busy measures all the same)")
            self.checked = True
        with contextlib.ExitStack() as stack:
            row = build(wanted, stack)
            rounds, max_seconds = (9, 1.0) if self.quick else (25, 8.0)
            found = rows.measure(row, rounds, max_seconds, busy)
        self.saved.add(key, wanted, found)
        return found


def about() -> dict:
    """Return what a time depends on besides the row."""
    flags = ("OMP_", "MALLOC_", "LLMOS_")
    return {
        "machine": machine.name(DEVICE),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(flags)},
    }


def pytest_configure(config):
    config.bench = Session(config)


def pytest_sessionstart(session):
    config, writer = session.config, session.config.get_terminal_writer()
    if config.getoption("progress") and writer.hasmarkup:
        config.bench.bar = progress.Bar(config.bench.wanted, writer)
        config.pluginmanager.register(config.bench.bar)


class Replay:
    """A clock for pytest-benchmark that advances by samples taken before."""

    now, samples = 0.0, iter(())

    def advance(self):
        self.now += next(self.samples)


replay = Replay()


def replayed() -> float:
    return replay.now


def pytest_collection_modifyitems(config, items):
    session = config.bench
    chosen = [session.chosen(item) for item in items]
    config.hook.pytest_deselected(items=[i for i, c in zip(items, chosen, strict=True) if not c])
    items[:] = [i for i, c in zip(items, chosen, strict=True) if c]
    for item in items:
        if "side_by_side" in item.fixturenames:
            session.wanted.setdefault(row_key(item), []).append(item.callspec.params["provider"])
            item.add_marker(pytest.mark.benchmark(timer=replayed))


@pytest.fixture
def side_by_side(request):
    """Return ``side_by_side(build)``, which reports the result of this test's provider.

    ``build(wanted, stack)`` makes the row for the providers in ``wanted``; ``stack`` is closed when
    the row has been measured.
    """

    def report(build):
        provider = request.node.callspec.params["provider"]
        why = None
        try:
            found = request.config.bench.measured(request.node, build).get(provider)
        except machine.Busy as e:
            why = str(e)
        if why is not None:
            pytest.fail(why, pytrace=False)
        if found is None:
            pytest.skip("no way to give the same")
        if "wrong" in found:
            (pytest.fail if provider == "kernel" else pytest.skip)(f"no time: {found['wrong']}")
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = found["extra"]["row"]
        benchmark.extra_info.update(found["extra"])
        replay.samples = iter(found["samples"])
        if benchmark.enabled:
            benchmark.pedantic(replay.advance, rounds=len(found["samples"]))

    return report


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["node"] = machine.name(DEVICE)
    machine_info["llmos"] = about() | {
        "quick": config.getoption("quick"),
        **machine.hardware(DEVICE),
        "limits": rates.limits(DEVICE),
        "state": machine.state(DEVICE),
        "versions": peers.versions(),
    }


def pytest_benchmark_update_json(config, benchmarks, output_json):
    wrong = [
        {"group": found["row"], "provider": provider, "why": found["wrong"]}
        for of_row in config.bench.found.values()
        for provider, found in of_row.items()
        if "wrong" in found
    ]
    output_json["llmos"] = {"wrong": wrong, "absent": peers.absent(DEVICE)}
    for entry in output_json["benchmarks"]:
        del entry["options"]


def pytest_terminal_summary(terminalreporter, config):
    """Print one line a row: our median, and the ratio of each provider's to it."""
    write, found = terminalreporter.write_line, config.bench.found
    if not found:
        return
    write("")
    write(f"{'median us of ours, and how many times as long the others take':70}")
    for of_row in found.values():
        medians = {k: v["extra"] for k, v in of_row.items() if "samples" in v}
        if "kernel" not in medians:
            continue
        write(line(medians))


def line(extras: dict[str, dict]) -> str:
    kernel = extras["kernel"]
    ratios = [f"{k} {e['us'] / kernel['us']:.2f}" for k, e in extras.items() if k != "kernel"]
    goals = [f"goal {k} {v}" for k, v in kernel.get("goal", {}).items()]
    error = kernel.get("error_over_budget", kernel.get("relative_error", ""))
    share = f"{kernel['share']:.0%}" if "share" in kernel else ""
    return f"{kernel['row']:62} {kernel['us']:9.1f} {share:>5} {error:>6}  " + ", ".join(
        [*ratios, *goals]
    )
