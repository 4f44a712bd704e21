"""Stress tests: repeats under load, graph capture, first calls by several threads.

Some run a function of this file in a fresh process: ``python test_stress.py first_calls cpu``.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from stress import CASE, DEVICE, GPU, needs_gpu, seeded  # noqa: F401  a fixture of every test

import llmos_kernels as lk
from llmos_kernels.testing import (
    CASES,
    OpRecorder,
    assert_within_budget,
    compare,
    draw,
    make_gradients,
    run,
    run_with_gradients,
    tensors,
)

HELPERS = Path(__file__).parents[1] / "helpers"
REPEATS = 250 if GPU else 20
THREADS = 8
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def session(*args, **env):
    """Run a function of this file in a fresh process with Triton's compiler; return its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLMOS", "TRITON"))}
    path = [str(HELPERS), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, __file__, *map(str, args)],
        env=environment | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@contextlib.contextmanager
def other_work():
    """Multiply matrices in another thread, on a GPU in another stream, while the context lasts."""
    done, counts = threading.Event(), []

    def work():
        stream = torch.cuda.Stream() if GPU else None
        with torch.cuda.stream(stream) if GPU else contextlib.nullcontext():
            x = torch.randn(4096 if GPU else 192, 4096 if GPU else 192, device=DEVICE)
            while not done.is_set():
                for _ in range(8):
                    x = (x @ x).tanh()
                if GPU:
                    stream.synchronize()
                counts.append(8)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield counts
    finally:
        done.set()
        thread.join()


@each_case
@pytest.mark.parametrize("real", [False, *[True] * GPU])
def test_same_bits_beside_other_work(case, real):
    """Outputs and gradients have the same bits under load; on a GPU also at a real model's size."""
    shapes = case.gpu_benchmark_shapes[:1] if real else (case.multi_block_shape,)
    if not shapes:
        pytest.skip("no model's size")
    args = case.make(*shapes, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    gradients = [torch.randn_like(o) for o in run(case.op, args)]
    first = run_with_gradients(case.op, args, gradients)
    with other_work() as counts:
        while not counts:
            time.sleep(1e-3)
        for _ in range(REPEATS):
            for name, value in run_with_gradients(case.op, args, gradients).items():
                assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("rows", [1, 67])
def test_same_int8_bits_beside_other_work(rows, threshold):
    x = torch.randn(rows, 300, device=DEVICE).bfloat16()
    weight, scale = lk.int8_quantize(torch.randn(129, 300, device=DEVICE))
    call = lambda: lk.int8_linear(x, weight, scale, outlier_threshold=threshold)
    first = call()
    with other_work():
        for _ in range(REPEATS):
            assert torch.equal(call(), first)


#: The cases that are captured, and whether with gradients. Gradients of products are not: cuBLAS
#: computes them, and torch must create its handles before a capture.
CAPTURED = {
    "layer_norm": True,
    "add_layer_norm": True,
    "attention-causal": True,
    "feed_forward-gelu": False,
    "linear": False,
    "embedding": False,
    "unpad": True,
    "pad": True,
}
REPLAYS = 100


def make_pack(folder: str, arch: str) -> None:
    """Build a pack of the kernels that ``captured`` launches."""
    from llmos_kernels._core.registry import DEFINED
    from llmos_kernels._tools import build_pack

    with build_pack.recorded_launches(arch) as launches:
        for name, backward in CAPTURED.items():
            with OpRecorder() as record:
                _step(CASE[name], *_arguments(CASE[name], backward, "cpu"))
            for op, given in record.calls:
                if DEFINED[op.name()].triton:
                    DEFINED[op.name()].launch(*given)
    build_pack.build(Path(folder), {arch: list(dict.fromkeys(launches))}, jobs=os.cpu_count() or 1)


def _arguments(case, backward, device):
    """Return arguments and the gradient of each output, or None."""
    args = case.make(
        case.multi_block_shape, dtype=torch.bfloat16, device=device, requires_grad=backward
    )
    return args, torch.randn_like(args[0]).detach() if backward else None


def _step(case, args, gradient):
    """Return the outputs and, if ``gradient`` is given, the gradients of the arguments."""
    made = case.op(*args)
    outputs = made if isinstance(made, tuple) else (made,)
    if gradient is None:
        return outputs
    leaves = [a for a in tensors(args) if a.requires_grad]
    return *outputs, *torch.autograd.grad(outputs, leaves, [gradient] * len(outputs))


def _capture(case, backward, mode):
    """Return arguments, gradient, the graph of a first, captured step, and its outputs."""
    args, gradient = _arguments(case, backward, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        made = _step(case, args, gradient)
    return args, gradient, graph, made


def captured(mode: str, pack: str = "") -> None:
    """Check that the first call of each case can be captured, and that its replays are right."""
    from llmos_kernels._triton.runtime import kernel_pack

    if pack:
        kernel_pack.FOLDER = Path(pack)
    for name, backward in CAPTURED.items():
        case = CASE[name]
        args, gradient, graph, made = _capture(case, backward, mode)
        for _ in range(REPLAYS):
            with torch.no_grad():
                for a in tensors(args):
                    if a.is_floating_point():
                        a.normal_()
            graph.replay()
            for value, expected in zip(made, _step(case, args, gradient), strict=True):
                assert torch.equal(value, expected), name
        print(name)


def refused(mode: str) -> None:
    """Check that a first call is captured or raises, and that later calls are right."""
    case = CASE["layer_norm"]
    try:
        _capture(case, True, mode)
    except RuntimeError as e:
        print(f"raised: {e}".splitlines()[0])
    else:
        print("captured")
    drawn = draw(
        case, case.multi_block_shape, dtype=torch.bfloat16, device="cuda", requires_grad=True
    )
    assert_within_budget(compare(case, *drawn), str(case))


@needs_gpu
def test_first_call_of_the_pack_is_captured(tmp_path):
    """The first call of kernels of the pack can be captured in torch's default mode.

    In that mode nothing in the process may allocate or synchronise.
    """
    session("make_pack", tmp_path, "sm_{}{}".format(*torch.cuda.get_device_capability()))
    assert session("captured", "global", tmp_path, LLMOS_PACK="require") == [*CAPTURED]


@needs_gpu
def test_first_call_of_triton_is_captured(tmp_path):
    """In the relaxed mode the first call can be captured: Triton may load what it compiled."""
    cache = {"LLMOS_PACK": "off", "TRITON_CACHE_DIR": str(tmp_path)}
    assert session("captured", "relaxed", **cache) == [*CAPTURED]


@needs_gpu
@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_first_call_of_triton_in_a_strict_capture(mode, tmp_path):
    """In a strict mode the first call of Triton may be refused, but is never wrong."""
    (line,) = session("refused", mode, LLMOS_PACK="off", TRITON_CACHE_DIR=str(tmp_path))
    assert line.startswith(("captured", "raised: "))


def first_calls(device: str) -> None:
    """Check the results of threads that make all calls for the first time, in different orders."""
    # Without dropout: threads would draw its seeds in any order.
    cases = [case for case in CASES if "dropout" not in case.name]
    given = []
    for case in cases:
        args = case.make(
            case.multi_block_shape, dtype=torch.bfloat16, device=device, requires_grad=True
        )
        given.append((case, args, make_gradients(run(case.reference, args))))
    start, found, failed = threading.Barrier(THREADS), {}, []

    def work(thread):
        start.wait()
        for i in range(len(given)):
            at = (i + thread * len(given) // THREADS) % len(given)
            case, args, gradients = given[at]
            try:
                found[thread, at] = run_with_gradients(case.op, args, gradients)
            except Exception as e:
                failed.append(f"{case}: {e!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, "\n".join(failed)
    for (_, at), results in found.items():
        case, args, gradients = given[at]
        for name, value in run_with_gradients(case.op, args, gradients).items():
            assert torch.equal(value, results[name]), f"{case}: {name}"
    for case in cases:
        drawn = draw(
            case, case.multi_block_shape, dtype=torch.bfloat16, device=device, requires_grad=True
        )
        assert_within_budget(compare(case, *drawn), str(case))
    print(len(found), "calls")


def test_threads_call_for_the_first_time(tmp_path):
    (line,) = session("first_calls", DEVICE, TRITON_CACHE_DIR=str(tmp_path))
    assert int(line.split()[0]) > THREADS * 20


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
