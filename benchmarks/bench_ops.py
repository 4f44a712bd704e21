"""Time every Case that has sizes: forward, backward and both, ours and competitors."""

import functools

import peers
import pytest
import torch
from rates import operations
from rows import DEVICE, Call, Row, worst

import llmos_kernels as lk
from llmos_kernels._tools import device_time
from llmos_kernels.testing import CASES, cast, make_gradients, run, run_with_gradients, tensors

BY_NAME = {case.name: case for case in CASES}
FORWARD, BACKWARD, BOTH = DIRECTIONS = "forward", "backward", "forward+backward"

#: Ratios to torch eager to reach on two cores, for each size in float32 and bfloat16.
_CPU_GOALS = {
    ("layer_norm", FORWARD): (2.0, 2.8, 1.8, 3.0, 0.9, None),
    ("add_layer_norm", FORWARD): (2.0, 3.5, 1.2, 3.5, 1.2, None),
    ("layer_norm", BACKWARD): (1.5, 1.5, 1.5, 1.5, None, None),
    ("attention", FORWARD): (2.0, 4.5, 2.0, 3.5, 1.5, 7.0, None, None),
    ("attention-causal", FORWARD): (2.0, 3.5),
    ("attention-padding", FORWARD): (2.5, 5.0),
    ("attention-bias", FORWARD): (2.0, 4.0),
    ("feed_forward", FORWARD): (2.2, 1.25, 2.5, 1.6, None, None),
    ("attention", BOTH): (None, None, None, None, None, None, 1.6, 4.0),
}
DTYPES = ("float32", "bfloat16")


def _sizes(case):
    return case.benchmark_shapes if DEVICE == "cpu" else case.gpu_benchmark_shapes


#: --quick measures the first size of each op, and the forward or backward of these in every size.
QUICK = {
    FORWARD: ("attention", "attention-causal", "layer_norm", "add_layer_norm", "linear"),
    BACKWARD: ("layer_norm", "add_layer_norm"),
    BOTH: (),
}
GRID = [
    pytest.param(
        case.name,
        size,
        direction,
        id=f"{case}-{'x'.join(map(str, size))}-{direction}",
        marks=[pytest.mark.quick] if i == 0 or case.name in QUICK[direction] else [],
    )
    for case in CASES
    for i, size in enumerate(_sizes(case))
    for direction in DIRECTIONS
]


def goals(op, size, dtype, direction):
    """Return the ratios that the project set out to reach for a row, by provider."""
    listed = _CPU_GOALS.get((op, direction))
    if listed is None or DEVICE != "cpu":
        return {}
    ratio = listed[2 * BY_NAME[op].benchmark_shapes.index(size) + DTYPES.index(dtype)]
    return {} if ratio is None else {"eager": ratio}


def attention_kernel(fn):
    """Return the name of torch's attention kernel that ``fn`` runs, or None."""
    with torch.profiler.profile() as profile:
        fn()
    prefix = "aten::_scaled_dot_product_"
    names = (e.key for e in profile.key_averages() if e.key.startswith(prefix))
    return next((n.removeprefix(prefix) for n in names if not n.endswith("_backward")), None)


@functools.lru_cache(maxsize=1)
def drawn(op, size, dtype):
    """Return the arguments of a row, and their results with gradients in float64 and by torch."""
    case = BY_NAME[op]
    torch.manual_seed(0)
    args = case.make(size, dtype=getattr(torch, dtype), device=DEVICE, requires_grad=True)
    exact = run_with_gradients(case.reference, cast(args, torch.float64))
    return args, exact, run_with_gradients(case.eager, args)


def plain(args):
    """Return the arguments without gradients."""
    return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)


def call_of(fn, args, direction, gradients):
    """Return the call that is timed."""
    if direction == FORWARD:
        return functools.partial(fn, *args)
    leaves = [t for t in tensors(args) if t.requires_grad]
    if direction == BOTH:
        return lambda: torch.autograd.grad(run_once(fn, args), leaves, gradients)
    outputs = run_once(fn, args)
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


def run_once(fn, args):
    out = fn(*args)
    return out if isinstance(out, tuple) else (out,)


def judged(case, fn, args, direction, exact, eager):
    """Return the error of what is timed."""
    if direction != FORWARD:
        return worst(run_with_gradients(fn, args), exact, eager)
    with torch.inference_mode():
        found = {f"output {i}": o for i, o in enumerate(run(fn, args))}
    return worst(found, exact, eager)


def moved(case, args, direction):
    """Return the bytes that a call must read and write at least.

    The forward reads its inputs and writes its results. The backward reads inputs and the results'
    gradients, and writes the inputs' gradients.
    """
    outputs = run_once(case.op, args)
    given, made = (sum(t.nbytes for t in some) for some in (list(tensors(args)), outputs))
    grads = sum(t.nbytes for t in tensors(args) if t.requires_grad)
    return {
        FORWARD: given + made,
        BACKWARD: given + made + grads,
        BOTH: 2 * (given + made) + grads,
    }[direction]


def flop(case, args, direction):
    """Return the floating-point operations of a row's GEMMs.

    The backward has twice those of the forward. Of attention only the pairs that the mask leaves
    count.
    """
    seen = 0.5 if "causal" in case.name else 1.0
    if case.name == "attention-padding":
        seen = 1.0 - args[4].float().mean().item()
    forward = round(operations(lambda: case.eager(*args)) * seen)
    return forward * {FORWARD: 1, BACKWARD: 2, BOTH: 3}[direction]


def op_row(op, size, dtype, direction, wanted):
    case = BY_NAME[op]
    args, exact, eager = drawn(op, size, dtype)
    row = Row(
        op,
        size,
        getattr(torch, dtype),
        direction,
        moved=moved(case, args, direction),
        flop=flop(case, args, direction),
        goals=goals(op, size, dtype, direction),
        gradients=direction != FORWARD,
    )
    args = plain(args) if direction == FORWARD else args
    gradients = make_gradients(run_once(case.op, args))
    turns = device_time.cold(args)[1:] if DEVICE == "cuda" else ()

    def build(provider):
        fn = case.op if provider == "kernel" else peers.OPS[provider](case)
        if fn is None:
            return None
        drawn_by_torch = "dropout" in case.name and provider in ("eager", "compile")
        about = {} if drawn_by_torch else judged(case, fn, args, direction, exact, eager)
        make = functools.partial(call_of, fn, direction=direction, gradients=gradients)
        call = Call(make(args), [make(other) for other in turns], about)
        if op.startswith("attention") and provider == "eager":
            about["runs"] = attention_kernel(call.run)
        return call

    for provider in wanted:
        row.add(provider, functools.partial(build, provider))
    return row


@pytest.mark.parametrize("provider", peers.ops(DEVICE))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op, size, direction", GRID)
def test_op(op, size, dtype, direction, provider, side_by_side):
    side_by_side(lambda wanted, stack: op_row(op, size, dtype, direction, wanted))


@pytest.mark.quick
@pytest.mark.parametrize("provider", ("kernel", "eager"))
@pytest.mark.parametrize("dtype", ("float16",))
@pytest.mark.parametrize("op, size, direction", [("linear", (2048, 384, 384), FORWARD)], ids=str)
def test_float16(op, size, dtype, direction, provider, side_by_side):
    """Time a product in the dtype for which no CPU has one."""
    side_by_side(lambda wanted, stack: op_row(op, size, dtype, direction, wanted))


@pytest.mark.quick
@pytest.mark.parametrize("provider", ("kernel", "eager"))
@pytest.mark.parametrize("direction", ("inference", "training"))
@pytest.mark.parametrize("dtype", ("float32",))
@pytest.mark.parametrize("op", ("call of layer_norm",))
def test_call(op, dtype, direction, provider, side_by_side):
    """Time a forward with next to nothing to compute, without gradients and with."""

    def build(wanted, stack):
        training = direction == "training"
        x = torch.randn(1, 64, device=DEVICE, requires_grad=training)
        weight, bias = torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)
        fns = {"kernel": lk.layer_norm, "eager": torch.nn.functional.layer_norm}
        row = Row(op, (1, 64), torch.float32, direction, moved=2 * x.nbytes, gradients=training)
        theirs = {"output": fns["eager"](x, (64,), weight, bias).detach()}
        exact = {"output": fns["eager"](x.detach().double(), (64,), weight.double(), bias.double())}
        for provider in wanted:
            call = functools.partial(fns[provider], x, (64,), weight, bias)
            about = worst({"output": call().detach()}, exact, theirs)
            row.add(provider, functools.partial(Call, call, (), about))
        return row

    side_by_side(build)
