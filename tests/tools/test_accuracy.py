"""Tests that miss an error budget are judged again, and fail unless it was chance."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmos_kernels import testing
from llmos_kernels._core import numerics
from llmos_kernels.testing import InaccurateError, assert_accurate, judge_again

TESTS = Path(__file__).parents[1]
EXACT = torch.ones(4, dtype=torch.float64)
ULP = torch.finfo(torch.float32).eps


def with_error(ulp):
    """Return ones with an error of so many ulp in float32; an error of torch of 1 allows three."""
    return (EXACT + ulp * ULP).float()


def compares(*errors):
    """Return a test whose first run has the first of the errors, and so on."""
    left = list(errors)

    def test():
        assert_accurate(with_error(left.pop(0)), EXACT, with_error(1), "x")

    return test


def miss(test):
    with pytest.raises(InaccurateError, match="x: error over budget") as raised:
        test()
    return raised.value


def test_one_miss_among_many_is_chance():
    judge_again(compares(5, *[2] * 16), miss(compares(5)))


def test_errors_that_stay_too_large_are_none():
    with pytest.raises(InaccurateError, match="17 runs"):
        judge_again(compares(*[4] * 17), miss(compares(4)))


def test_a_large_miss_is_not_judged_again():
    missed = miss(compares(20))
    with pytest.raises(InaccurateError) as raised:
        judge_again(lambda: pytest.fail("it ran"), missed)
    assert raised.value is missed
    assert miss(lambda: assert_accurate(EXACT, EXACT, with_error(1), "x")).is_hopeless  # The dtype.


def test_each_comparison_counts():
    """A comparison that some runs lack, and one of two that always misses, are failures."""
    first = compares(*[2] * 17)
    second = compares(*[4] * 17)

    def both():
        first()
        second()

    with pytest.raises(InaccurateError, match=r"17 runs.*comparison 1, x"):
        judge_again(both, miss(compares(4)))
    runs = []

    def sometimes():
        runs.append(1)
        if len(runs) > 1:
            assert_accurate(with_error(0), EXACT, with_error(1), "x")

    with pytest.raises(InaccurateError, match="inf"):
        judge_again(sometimes, miss(compares(4)))


def test_runs_have_seeds_of_their_own():
    seen = []
    judge_again(lambda: seen.append(testing.generator(3).initial_seed()), miss(compares(4)))
    assert len(set(seen)) == 17 and seen[0] == numerics.shifted(3)
    with pytest.raises(ZeroDivisionError):
        judge_again(lambda: 1 / 0, miss(compares(4)))
    assert testing.generator(3).initial_seed() == seen[0]
    with pytest.raises(InaccurateError):  # Single comparisons are judged again.
        compares(5)()


RIG = """
import torch
from llmos_kernels.testing import assert_accurate

EXACT = torch.ones(4, dtype=torch.float64)

def off(ulp):
    made, eager = (EXACT + u * torch.finfo(torch.float32).eps for u in (ulp, 1))
    assert_accurate(made.float(), EXACT, eager.float(), "x")

def test_chance(device):
    off(5 if torch.initial_seed() == 0 else 1)

def test_fault():
    off(5)
"""


def test_the_rig_judges_again(tmp_path):
    (tmp_path / "test_rig.py").write_text(RIG)
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "test_rig.py::test_fault" in done.stdout and "17 runs" in done.stdout, done.stdout
    assert "1 failed, 1 passed" in done.stdout, done.stdout


def test_a_gradient_that_is_rounding_alone_is_judged_beside_others():
    """Such as that of a bias of keys: ten times torch's error, but within an ulp of the others."""
    zero = EXACT * 1e-17
    gradients = [
        (with_error(2), EXACT, with_error(1)),
        ((zero + 0.5 * ULP).float(), zero, (zero + 0.05 * ULP).float()),
        (with_error(0).view(2, 2), EXACT.view(2, 2), with_error(0).view(2, 2)),
    ]
    alone = numerics.judged_together([dict(zip("abc", gradients, strict=True))])
    assert alone["b"] > 4
    judged = numerics.judged_together(
        [dict(zip("abc", numerics.with_scale(gradients), strict=True))]
    )
    assert judged["b"] == judged["a"] == alone["a"] and judged["c"] == alone["c"]
    gradients[1] = ((zero + 40 * ULP).float(), *gradients[1][1:])
    wrong = numerics.judged_together(
        [dict(zip("abc", numerics.with_scale(gradients), strict=True))]
    )
    assert wrong["b"] > 10
