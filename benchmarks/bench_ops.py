"""Every Case that has sizes, forward and backward: ours, torch eager and torch.compile."""

import functools

import pytest
import torch
from rates import operations

import llmos_kernels as lk
from llmos_kernels.testing import CASES, cast, error_over_budget, errors, run, tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
GRID = [(c, s) for c in CASES for s in (c.sizes if DEVICE == "cpu" else c.gpu_sizes)]
# Steps of training, where the two directions are judged together.
TRAINING = [(c, s) for c, s in GRID if c.name.startswith("attention") and 1 < s[2] < 1024]

_CPU_GOALS = {
    ("layer_norm", "forward"): (2.0, 2.8, 1.8, 3.0, 0.9, None),
    ("add_layer_norm", "forward"): (2.0, 3.5, 1.2, 3.5, 1.2, None),
    ("layer_norm", "backward"): (1.5, 1.5, 1.5, 1.5, None, None),
    ("attention", "forward"): (2.0, 4.5, 2.0, 3.5, 1.5, 7.0, None, None),
    ("attention-causal", "forward"): (2.0, 3.5),
    ("attention-padding", "forward"): (2.5, 5.0),
    ("attention-bias", "forward"): (2.0, 4.0),
    ("feed_forward", "forward"): (2.2, 1.25, 2.5, 1.6, None, None),
    ("attention", "training"): (None, None, None, None, None, None, 1.6, 4.0),
}


def goal(case, size, dtype, direction):
    """The ratio to torch eager that the project set out to reach on two cores, if any."""
    goals = _CPU_GOALS.get((case.name, direction))
    if goals is None or DEVICE != "cpu" or size not in case.sizes:
        return None
    return goals[2 * case.sizes.index(size) + DTYPES.index(dtype)]


def attention_kernel(fn):
    """The attention kernel of torch that ``fn`` runs, or None."""
    with torch.profiler.profile() as profile:
        fn()
    prefix = "aten::_scaled_dot_product_"
    names = (e.key for e in profile.key_averages() if e.key.startswith(prefix))
    return next((n.removeprefix(prefix) for n in names if not n.endswith("_backward")), None)


def needed(case, fn):
    """The operations of ``fn``, of causal attention half."""
    return operations(fn) // (2 if "causal" in case.name else 1)


def compiled(fn):
    torch._dynamo.reset()
    return torch.compile(fn)


each = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_case = pytest.mark.parametrize("case, size", GRID, ids=str)


@each
@each_case
def test_forward(case, size, dtype, compare):
    torch.manual_seed(0)
    args = case.make(size, dtype=dtype, device=DEVICE)
    eager = case.rival or case.eager
    fns = {"kernel": case.op, "eager": eager, "compile": compiled(eager)}
    with torch.inference_mode():
        ours, theirs = run(case.op, args), run(case.eager, args)
        exact = run(case.reference, cast(args, torch.float64))
        error = max(error_over_budget(*values) for values in zip(ours, exact, theirs, strict=True))
        assert error <= 1
        moved = sum(t.nbytes for t in (*tensors(args), *ours))
        calls = {k: functools.partial(fn, *args) for k, fn in fns.items()}
        name = f"{case} {list(size)} {str(dtype)[6:]} forward"
        row = {"goal": goal(case, size, dtype, "forward"), "error_over_budget": round(error, 3)}
        row |= {"dtype": dtype, "flop": needed(case, calls["eager"])}
        compare(name, calls, moved=moved, **row, eager_kernel=attention_kernel(calls["eager"]))


@each
@each_case
def test_backward(case, size, dtype, compare):
    torch.manual_seed(0)
    args = case.make(size, dtype=dtype, device=DEVICE, requires_grad=True)
    error = max(errors(case, args).values())
    assert error <= 1
    leaves = [t for t in tensors(args) if t.requires_grad]

    def backward(fn):
        outputs = run(fn, args)
        gradients = [torch.randn_like(o) for o in outputs]
        return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    calls = {"kernel": backward(case.op), "eager": backward(case.rival or case.eager)}
    inputs = [t for t in leaves if t.ndim > 1]
    moved = (
        sum(t.nbytes for t in inputs) + sum(o.nbytes for o in run(case.op, args)) + inputs[0].nbytes
    )
    name = f"{case} {list(size)} {str(dtype)[6:]} backward"
    row = {"goal": goal(case, size, dtype, "backward"), "error_over_budget": round(error, 3)}
    # Two products for each of the forward's.
    flop = 2 * needed(case, lambda: case.eager(*args))
    compare(name, calls, moved=moved, dtype=dtype, flop=flop, **row)


@each
@pytest.mark.parametrize("case, size", TRAINING, ids=str)
def test_training(case, size, dtype, compare):
    """Forward and backward of a step, graph and all."""
    torch.manual_seed(0)
    args = case.make(size, dtype=dtype, device=DEVICE, requires_grad=True)
    leaves = [t for t in tensors(args) if t.requires_grad]
    gradient = torch.randn_like(run(case.op, args)[0])

    def step(fn):
        return lambda: torch.autograd.grad(fn(*args), leaves, gradient)

    eager = step(case.rival or case.eager)
    moved = sum(t.nbytes for t in leaves) * 2 + gradient.nbytes * 2
    name = f"{case} {list(size)} {str(dtype)[6:]} forward + backward"
    error = max(errors(case, args).values())
    assert error <= 1
    row = {"goal": goal(case, size, dtype, "training"), "eager_kernel": attention_kernel(eager)}
    row |= {"error_over_budget": round(error, 3), "dtype": dtype}
    row |= {"flop": 3 * needed(case, lambda: case.eager(*args))}
    compare(name, {"kernel": step(case.op), "eager": eager}, moved=moved, **row)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_call(gradients, compare):
    """What one call costs where there is next to nothing to compute."""
    x = torch.randn(1, 64, device=DEVICE, requires_grad=gradients)
    weight, bias = torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    fns = {"kernel": lk.layer_norm, "eager": torch.nn.functional.layer_norm}
    calls = {k: functools.partial(fn, x, (64,), weight, bias) for k, fn in fns.items()}
    name = f"a call of layer_norm [1, 64], {'with' if gradients else 'without'} gradients"
    with torch.set_grad_enabled(gradients):
        compare(name, calls, moved=x.nbytes * 2, goal=None)
