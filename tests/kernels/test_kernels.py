"""What every kernel must satisfy when called directly: C++, and Triton with or without a GPU."""

import os

import emulated_cuda
import pytest
import torch
from guards import Guards, bits

from llmos_kernels._core.registry import DEFINED, HAS_TRITON
from llmos_kernels.testing import (
    CASES,
    DTYPES,
    assert_within_budget,
    cast,
    draw,
    judged_together,
    raw_calls,
    run,
    tensors,
)

GPU = torch.cuda.is_available()
KEYS = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}
GRID = [(case, shape) for case in CASES for shape in case.shapes]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def kernels(op):
    """Yield (name, device, callable) of each kernel of ``op`` on this machine."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU"):
        yield "cpp", "cpu", lambda *args: op._op_dk(KEYS["cpu"], *args)
    if GPU and hasattr(torch.ops.llmos, f"{op.name().partition('::')[2]}_triton"):
        yield "cuda", "cuda", lambda *args: op._op_dk(KEYS["cuda"], *args)
    if emulated := emulated_cuda.kernel(op):
        yield "emulated", "cpu", emulated
    if DEFINED[op.name()].triton and HAS_TRITON and not os.environ.get("LLMOS_SKIP_TRITON"):
        yield "triton", "cuda" if GPU else "cpu", DEFINED[op.name()].launch


def is_interpreted(name):
    """Return True if Triton's interpreter or the emulation of CUDA runs the kernel: it is slow."""
    return name.endswith("emulated") or (name.endswith("triton") and not GPU)


def draws_of_calls(case, shape, dtype, count=None):
    """Yield (name, kernel, reference, arguments of each draw) of each kernel of ``case``."""
    recorded = {
        device: [
            raw_calls(case, args)
            for args in draw(case, shape, count, dtype=dtype, device=device, requires_grad=True)
        ]
        for device in {"cpu", "cuda" if GPU else "cpu"}
    }
    for i, (op, _) in enumerate(recorded["cpu"][0]):
        for name, device, kernel in kernels(op):
            arguments = [called[i][1] for called in recorded[device]]
            if is_interpreted(name):
                if dtype != torch.float32 and shape[-1] > 1 << 16:
                    continue  # The loop over a wide row does not depend on the dtype.
                arguments = arguments[:2]
            if name == "emulated" and not emulated_cuda.takes(op, arguments[0]):
                continue
            yield f"{op.name()} {name}", kernel, DEFINED[op.name()].reference, arguments


def calls(case, shape, dtype):
    """Yield (name, kernel, reference, arguments) of one draw."""
    for name, kernel, reference, arguments in draws_of_calls(case, shape, dtype, 1):
        yield name, kernel, reference, arguments[0]


def outputs(fn, args):
    """Return the outputs of ``fn`` that are not None."""
    return [o for o in run(fn, args) if o is not None]


@each_case
def test_every_backend_is_here(case):
    names = {name.split()[1] for name, *_ in calls(case, case.shapes[-1], torch.float32)}
    assert names - {"cuda", "emulated"} == {"cpp", "triton"}, "make build provides both"


def is_integer(t):
    return not t.is_floating_point()


def guarded(name, kernel, args):
    """Return the outputs of a kernel and check what it writes.

    It must write every element of each output, and nothing outside of them.
    """
    guards = Guards()
    inputs = [guards.copy_of(a) if isinstance(a, torch.Tensor) else a for a in args]
    with guards:
        results = outputs(kernel, inputs)
    assert len(guards.buffers) > sum(1 for _ in tensors(args)), "no output was seen"
    guards.assert_intact(name)
    for a, b in zip(tensors(inputs), tensors(args), strict=True):
        assert torch.equal(a, b), f"{name} changed an input"
    for i, out in enumerate(results):
        # Of integers -1 may be a result; they are compared with the reference.
        unwritten = not is_integer(out) and (bits(out) == -1).any()
        assert not unwritten, f"{name} left elements of output {i} unwritten"
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case, shape", GRID, ids=str)
def test_matches_reference(case, shape, dtype):
    """Kernels are within the error budget; the first draw runs with guard bands."""
    for name, kernel, reference, drawn in draws_of_calls(case, shape, dtype):
        results = []
        for i, args in enumerate(drawn):
            made = outputs(kernel, args) if i else guarded(name, kernel, args)
            exact, eager = outputs(reference, cast(args, torch.float64)), outputs(reference, args)
            assert all(torch.equal(m, e) for m, e in zip(made, eager, strict=True) if is_integer(m))
            compared = enumerate(zip(made, exact, eager, strict=True))
            compared = [(k, values) for k, values in compared if not is_integer(values[0])]
            results.append({f"output {k}": values for k, values in compared})
            if is_interpreted(name) and max(judged_together(results).values(), default=0) <= 1:
                break  # A second draw is needed only if the first misses the budget by chance.
        assert_within_budget(results, name)


def test_guard_bands_can_fail():
    guards = Guards()
    with guards:
        t = torch.empty(4)
    torch.as_strided(t, (5,), (1,))[4] = 0
    with pytest.raises(AssertionError, match="wrote outside"):
        guards.assert_intact("a planted fault")


@each_case
def test_opcheck(case):
    recorded = raw_calls(
        case, case.make(case.small_shape(5), dtype=torch.float32, requires_grad=True)
    )
    assert recorded, "the case never reached an op"
    for op, args in recorded:
        torch.library.opcheck(op, args)


@each_case
def test_same_bits_on_every_repeat(case):
    for name, kernel, _, args in calls(case, case.multi_block_shape, torch.bfloat16):
        first = outputs(kernel, args)
        # Triton's interpreter is as deterministic as numpy.
        for _ in range(5 if GPU or not name.endswith("triton") else 1):
            for a, b in zip(outputs(kernel, args), first, strict=True):
                assert torch.equal(a, b)


@each_case
def test_strided_inputs(case):
    """Kernels accept tensors with any strides of rows and columns, with the same bits."""
    for name, kernel, _, args in calls(
        case, (6, 5, 33) if case.row_wise else case.small_shape(19), torch.float32
    ):
        for layout in (lambda t: t.repeat_interleave(2, 0)[::2], lambda t: t.mT.contiguous().mT):
            strided = [
                layout(a) if isinstance(a, torch.Tensor) and a.ndim >= 3 else a for a in args
            ]
            for a, b in zip(outputs(kernel, strided), outputs(kernel, args), strict=True):
                assert torch.equal(a, b), name


@pytest.mark.parametrize("case", [c for c in CASES if "dropout" in c.name and c.row_wise], ids=str)
def test_dropout_masks_are_bit_equal(case):
    """Kernels and reference drop the same elements."""
    for dtype in DTYPES:
        for name, kernel, reference, args in calls(case, (37, 1003), dtype):
            for out, expected in zip(outputs(kernel, args), outputs(reference, args), strict=True):
                if out.shape == (37, 1003):
                    assert torch.equal(out == 0, expected == 0), name
