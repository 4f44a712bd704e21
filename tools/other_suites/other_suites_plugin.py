"""A pytest plugin that puts our functions and modules in place of torch's, in its process alone.

``other_suites.py`` runs pytest with it. The environment says what to do:

    LLMOS_SUITE_RESULTS   the file for the outcomes: test ids that failed, and those that passed
    LLMOS_SUITE_STOCK     a file of test ids to run with torch's own functions; else all, with ours
"""

import functools
import json
import os
import threading
from pathlib import Path

import torch
import torch.nn.functional as F

import llmos_kernels as lk
from llmos_kernels.ops.linear import PLAIN_TENSORS

#: Those of our functions and modules that torch has under the same name.
FUNCTIONS = [name for name in lk.__all__ if hasattr(F, name)]
MODULES = [name for name in lk.nn.__all__ if hasattr(torch.nn, name)]


class Outcomes:
    """The ids of the tests, and of the files that could not be collected, by outcome."""

    def __init__(self):
        self.failed, self.passed = set(), set()

    def add(self, report):
        """Take a report of pytest about a test's setup, call or teardown, or about a file."""
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.passed and getattr(report, "when", None) == "call":
            self.passed.add(report.nodeid)

    def write(self, path):
        """Write both lists; a test that passed and then failed in its teardown has failed."""
        lists = {"failed": sorted(self.failed), "passed": sorted(self.passed - self.failed)}
        Path(path).write_text(json.dumps(lists))


OUTCOMES = Outcomes()
_state = threading.local()


def replacement(ours, stock):
    """Return a function that calls ``ours``; but ``stock`` from inside of ours, which uses it.

    Nested tensors and tensors of subclasses go to ``stock`` too, as in our modules.
    """

    @functools.wraps(stock)
    def call(*args, **kwargs):
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        plain = all(type(t) in PLAIN_TENSORS and not t.is_nested for t in tensors)
        if not plain or getattr(_state, "inside", False):
            return stock(*args, **kwargs)
        _state.inside = True
        try:
            return ours(*args, **kwargs)
        finally:
            _state.inside = False

    return call


def replace():
    """Put ours in place of torch's, where ``torch.nn`` and its files have them."""
    for name in FUNCTIONS:
        setattr(F, name, replacement(getattr(lk, name), getattr(F, name)))
    for name in MODULES:
        stock, ours = getattr(torch.nn, name), getattr(lk.nn, name)
        home = torch.nn.modules.__dict__[stock.__module__.rpartition(".")[2]]
        for module in (torch.nn, torch.nn.modules, home):
            setattr(module, name, ours)


def pytest_configure(config):
    """Replace before any test file is imported."""
    if "LLMOS_SUITE_STOCK" not in os.environ:
        replace()


def pytest_collection_modifyitems(config, items):
    """Keep the tests that are asked for."""
    if "LLMOS_SUITE_STOCK" in os.environ:
        wanted = set(json.loads(Path(os.environ["LLMOS_SUITE_STOCK"]).read_text()))
        items[:] = [item for item in items if item.nodeid in wanted]


def pytest_runtest_logreport(report):
    """Note the outcome of a test."""
    OUTCOMES.add(report)


def pytest_collectreport(report):
    """Note a file that could not be collected."""
    if report.failed:
        OUTCOMES.add(report)


def pytest_sessionfinish(session):
    """Write the outcomes, but not from the workers of xdist."""
    if not hasattr(session.config, "workerinput"):
        OUTCOMES.write(os.environ["LLMOS_SUITE_RESULTS"])
