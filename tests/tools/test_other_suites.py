"""``tools/other_suites`` tells the differences of a small suite made for it."""

import subprocess
import sys
from pathlib import Path

import other_suites
import pytest

TOOL = Path(other_suites.__file__)
PASSING = """
import unittest
import torch
import torch.nn.functional as F
from torch import nn


class TestPasses(unittest.TestCase):
    def test_ours_are_there(self):
        for cls in (nn.Linear, nn.LayerNorm, nn.MultiheadAttention, nn.TransformerEncoderLayer):
            self.assertTrue(cls.__module__.startswith("llmos_kernels"))
        layer = nn.Transformer(8, 2, 1, 1, 16).encoder.layers[0]
        self.assertIs(type(layer), nn.TransformerEncoderLayer)
        with torch.profiler.profile() as profile:
            F.layer_norm(torch.randn(3, 8), (8,))
        self.assertIn("llmos::layer_norm_forward", {e.key for e in profile.key_averages()})

    def test_values(self):
        x, layer = torch.randn(3, 8), nn.Linear(8, 5)
        torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)

    def test_what_is_left_to_torch(self):
        given = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)])
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        with torch.no_grad():
            self.assertEqual(encoder(given).size(0), 2)
            with self.assertRaises(AssertionError):
                encoder(given, src_key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
"""
DIFFERENT = """
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def test_wrong_everywhere():
    assert F.relu(torch.ones(())) == 2


def test_is_causal_and_mask_fails():
    x = torch.randn(1, 1, 3, 8)
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(RuntimeError, match="Explicit attn_mask"):
        F.scaled_dot_product_attention(x, x, x, torch.ones(3, 3), is_causal=True)


@pytest.mark.parametrize("dtype", ["int64", "float32"])
def test_of_each_dtype(dtype):
    x = torch.ones(3, 3, dtype=getattr(torch, dtype))
    assert (F.linear(x, x) == 3).all()
"""
STALE = """
def test_is_causal_and_mask_fails():
    pass
"""


def run(folder, *arguments):
    """Return the exit status of the tool, and what it says after pytest's own output."""
    command = [sys.executable, TOOL, folder, "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout.rpartition("passed with llmos_kernels")[2], done


def test_a_small_suite(tmp_path):
    """A test fails with both, one differs as the table says, and one in a way that is new."""
    (tmp_path / "test_passing.py").write_text(PASSING)
    (tmp_path / "test_different.py").write_text(DIFFERENT)
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    status, report, done = run(tmp_path)
    assert status == 1, done
    assert "4 passed with llmos_kernels" in done.stdout
    expected = {
        "2 failed with torch's too": ["test_broken.py", "test_different.py::test_wrong_everywhere"],
        "1 accepted differences": ["test_different.py::test_is_causal_and_mask_fails: all masks"],
        "1 new differences": ["test_different.py::test_of_each_dtype[int64]"],
        "0 no longer different": [],
    }
    lines = iter(report.strip().splitlines())
    for title, tests in expected.items():
        assert next(lines) == title
        for test in tests:
            assert next(lines).startswith(f"  {test}")
    assert not list(lines)


def test_arguments_go_to_pytest(tmp_path):
    """Without a new difference the exit status is 0."""
    (tmp_path / "test_different.py").write_text(DIFFERENT)
    status, report, done = run(tmp_path, "-k", "float32 or wrong")
    assert status == 0, done
    assert "1 failed with torch's too" in report and "0 new differences" in report


def test_an_entry_that_is_no_longer_true(tmp_path):
    """The table is not to keep what does not differ."""
    (tmp_path / "test_stale.py").write_text(STALE)
    status, report, done = run(tmp_path)
    assert status == 1, done
    assert report.strip().endswith("1 no longer different\n  *::test_is_causal_and_mask_fails*")


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["no_such_file.py"]], ids=str)
def test_pytest_cannot_run(tmp_path, arguments):
    """That is no success."""
    status, _, done = run(tmp_path, *arguments)
    assert status == 2 and "pytest ended with status 4" in done.stderr
