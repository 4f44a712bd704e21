"""What every op must satisfy, on every device of this machine: each test runs every Case."""

import copy

import pytest
import torch
import torch._inductor.config
import torch.autograd.forward_ad as fwAD

from llmos_kernels import layer_norm
from llmos_kernels._core.registry import use_reference
from llmos_kernels.testing import (
    CASES,
    DTYPES,
    assert_accurate,
    assert_within_budget,
    cast,
    compare,
    draw,
    make_gradients,
    map_tensors,
    run,
    run_with_gradients,
    tensors,
)

GRID = [(case, shape) for case in CASES for shape in case.shapes]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def middle(case):
    """Return the largest shape of the case whose last dimension is below 1024."""
    return max((s for s in case.shapes if s[-1] < 1024), key=lambda s: torch.Size(s).numel())


def check(case, *draws, gradients=None):
    """Assert that outputs and gradients of all draws together are within the error budget."""
    assert_within_budget(compare(case, *draws, gradients=gradients), str(case))


@each_dtype
@pytest.mark.parametrize("case, shape", GRID, ids=str)
def test_matches_reference(case, shape, dtype, device):
    check(case, *draw(case, shape, dtype=dtype, device=device, requires_grad=True))


@each_case
def test_gradient_formula(case, device):
    args = case.make(case.gradcheck_shape, dtype=torch.float64, device=device, requires_grad=True)

    def fn(*args):
        return run(case.op, args)

    assert torch.autograd.gradcheck(fn, args)
    assert torch.autograd.gradgradcheck(fn, args)


@pytest.fixture
def math_sdpa():
    """Use torch's math attention: its fused one has no second derivative, forward mode or vmap."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@pytest.mark.usefixtures("math_sdpa")
@each_case
def test_second_derivative(case, device):
    def second(fn, args):
        outputs = run(fn, args)
        leaves = [a for a in tensors(args) if a.requires_grad]
        first = torch.autograd.grad(outputs, leaves, make_gradients(outputs), create_graph=True)
        first = [f for f in first if f.requires_grad]  # The bias gradient depends only on dy.
        return torch.autograd.grad(
            first, leaves, make_gradients(first, seed=2), materialize_grads=True
        )

    args = case.make(middle(case), dtype=torch.float32, device=device, requires_grad=True)
    results = (
        second(case.op, args),
        second(case.reference, cast(args, torch.float64)),
        second(case.eager, args),
    )
    for i, values in enumerate(zip(*results, strict=True)):
        assert_accurate(*values, what=f"second derivative {i}")


@each_case
def test_the_reference_is_what_eager_computes(case):
    """In float64 they agree but for rounding: a wrong reference would only widen the budget."""
    args = case.make(middle(case), dtype=torch.float64, device="cpu", requires_grad=True)
    exact, eager = (run_with_gradients(fn, args) for fn in (case.reference, case.eager))
    for name, value in exact.items():
        torch.testing.assert_close(value, eager[name], rtol=1e-9, atol=1e-11, msg=name)


def _sliced(t):
    wide = torch.full(
        (*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype, device=t.device
    )
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def _transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def _every_other(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def _misaligned(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def _expanded(t):
    return t[..., :1].expand(t.shape)


def _repeated_row(t):
    return t[:1].expand(t.shape)


LAYOUTS = [_sliced, _transposed, _every_other, _misaligned, _expanded, _repeated_row]


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.strip("_"))
@each_case
def test_layouts(case, layout, dtype, device):
    """Inputs, and the gradients of outputs, may have any layout."""
    args = case.make(middle(case), dtype=dtype, device=device, requires_grad=True)
    args = map_tensors(layout, args)
    gradients = [layout(g) for g in make_gradients(run(case.op, args))]
    # With equal elements attention's softmax is uniform, with equal rows its gradient is 0. Errors
    # are then noise, and only the bits are compared with those of contiguous inputs.
    if case.row_wise or layout not in (_expanded, _repeated_row):
        check(case, args, gradients=gradients)
    actual = run_with_gradients(case.op, args, gradients)
    contiguous = map_tensors(torch.clone, args)
    expected = run_with_gradients(case.op, contiguous, [g.clone() for g in gradients])
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@each_case
def test_inputs_are_unmodified(case, device):
    args = case.make(middle(case), device=device, requires_grad=True)
    before = copy.deepcopy(args)
    run_with_gradients(case.op, args)
    for a, b in zip(tensors(args), tensors(before), strict=True):
        assert torch.equal(a, b)


@each_dtype
@each_case
def test_same_bits_on_every_repeat(case, dtype, device):
    args = case.make(case.multi_block_shape, dtype=dtype, device=device, requires_grad=True)
    first = run_with_gradients(case.op, args)
    for _ in range(50):
        for name, value in run_with_gradients(case.op, args).items():
            assert torch.equal(value, first[name]), name


@each_dtype
@pytest.mark.parametrize(
    "case",
    # A dropout mask depends on the index of the row; the 2d case normalizes several rows.
    [c for c in CASES if c.row_wise and "dropout" not in c.name and "2d" not in c.name],
    ids=str,
)
def test_row_alone_is_the_row_in_its_batch(case, dtype, device):
    for d in (64, 129, 1000):
        args = case.make((33, d), dtype=dtype, device=device)
        batch = run(case.op, args)
        for row in (0, 17, 32):
            single_row = tuple(
                a[row : row + 1] if isinstance(a, torch.Tensor) and a.shape == (33, d) else a
                for a in args
            )
            for alone, together in zip(run(case.op, single_row), batch, strict=True):
                assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@each_case
@torch._inductor.config.patch(fallback_random=True)  # Else it draws the seeds of dropout itself.
def test_compiles_whole(case, backend, device):
    """Also with other sizes, for which nothing is compiled again."""
    torch._dynamo.reset()
    compiled = torch.compile(case.op, fullgraph=True, dynamic=True, backend=backend)
    for rows in (5, 9, 17):
        args = case.make(case.small_shape(rows), device=device, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=rows == 17):
            actual = run_with_gradients(compiled, args)
        expected = run_with_gradients(case.op, args)
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name])


@pytest.mark.usefixtures("math_sdpa")
@each_case
def test_forward_mode(case, device):
    if "dropout" in case.name:
        return
    args = case.make(case.small_shape(4), device=device)
    tangents = [
        torch.randn_like(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else None
        for a in args
    ]

    def derivative(fn):
        with fwAD.dual_level():
            dual = [
                a if t is None else fwAD.make_dual(a, t)
                for a, t in zip(args, tangents, strict=True)
            ]
            return [fwAD.unpack_dual(o).tangent for o in run(fn, dual)]

    for actual, expected in zip(derivative(case.op), derivative(case.eager), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_only_the_sum_is_used(device):
    """If only h is used, the norm adds nothing to its gradient, not even 0 or NaN."""
    for name in ("add_layer_norm", "add_layer_norm-dropout"):
        case = next(c for c in CASES if c.name == name)
        args = case.make((4, 16), device=device, requires_grad=True)
        with torch.no_grad():
            args[0][1, 3] = float("inf")
        run(case.op, args)[1].sum().backward()
        assert args[3].grad is None and args[0].grad.isfinite().all()
        assert torch.equal(args[1].grad, torch.ones_like(args[1]))


def test_gradient_of_a_float32_bias_alone(device):
    bias = torch.zeros(8, device=device, requires_grad=True)
    x, dy = torch.randn(2, 5000, 8, device=device).bfloat16()
    layer_norm(x, (8,), None, bias).backward(dy)
    torch.testing.assert_close(bias.grad, dy.double().sum(0).float(), rtol=1e-5, atol=1e-4)


@each_case
def test_exports(case, device):
    class Model(torch.nn.Module):
        def forward(self, *args):
            return run(case.op, full(args))

    args = case.make(case.small_shape(4), device=device)
    rest = [a for a in args if not isinstance(a, torch.Tensor)]

    def full(given):
        given, others = iter(given), iter(rest)
        return tuple(next(given) if isinstance(a, torch.Tensor) else next(others) for a in args)

    program = torch.export.export(Model(), tuple(tensors(args)))
    assert any("llmos" in str(node.target) for node in program.graph.nodes)
    results = program.module()(*tensors(args)), run(case.op, args)
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        if "dropout" not in case.name:
            assert torch.equal(actual, expected)


@pytest.mark.usefixtures("math_sdpa")
@each_case
def test_function_transforms(case, device):
    if "dropout" in case.name:
        pytest.skip("torch.func refuses to draw random numbers, as it does for torch's dropout")
    args = case.make((4, 3, 16) if case.row_wise else case.small_shape(4), device=device)
    at = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor))
    if case.row_wise:  # One row is enough for a Hessian.
        same = [isinstance(a, torch.Tensor) and a.shape == args[at].shape for a in args]
        small_args = tuple(a[:1] if s else a for a, s in zip(args, same, strict=True))
    else:
        small_args = case.make(case.gradcheck_shape, device=device)

    def loss(fn, x):
        return sum(o.square().sum() for o in run(fn, (*small_args[:at], x, *small_args[at + 1 :])))

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        actual = transform(lambda x: loss(case.op, x))(small_args[at])
        expected = transform(lambda x: loss(case.eager, x))(small_args[at])
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
    if not case.row_wise:
        return
    in_dims = tuple(0 if s else None for s in same)
    batched = torch.vmap(lambda *a: run(case.op, a), in_dims)(*args)
    for actual, expected in zip(batched, run(case.op, args), strict=True):
        torch.testing.assert_close(actual, expected)


# torch's rms_norm warns that it does not use its fused kernel.
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@each_case
def test_autocast(case, device):
    """Under autocast an op returns the dtype and the values of torch's op."""
    args = case.make(case.small_shape(6), device=device)
    low = tuple(
        a.bfloat16() if isinstance(a, torch.Tensor) and a.is_floating_point() and a.ndim > 1 else a
        for a in args
    )
    for inputs in (args, low):
        with torch.autocast(device, torch.bfloat16):
            results = run(case.op, inputs), run(case.eager, inputs)
        for actual, eager in zip(*results, strict=True):
            assert actual.dtype == eager.dtype
            torch.testing.assert_close(actual, eager, atol=0.05, rtol=0.02)


@each_case
def test_reference_answers_in_float64_and_on_request(case, device):
    args = case.make(case.small_shape(4), dtype=torch.float64, device=device)
    for actual, expected in zip(run(case.op, args), run(case.reference, args), strict=True):
        assert torch.equal(actual, expected)
    args = case.make(case.small_shape(4), device=device)
    by_request = run(lambda *a: case.op(*a, backend="reference"), args)
    for actual, expected in zip(by_request, run(case.reference, args), strict=True):
        assert torch.equal(actual, expected)


@each_case
def test_bad_calls_name_the_value(case, device):
    args = case.make(case.small_shape(4), device=device)
    with pytest.raises(ValueError, match="'cuda-magic'"):
        case.op(*args, backend="cuda-magic")
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn)[case.any_dtype :]:
        with pytest.raises(TypeError, match=str(dtype)):
            case.op(*(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args))
    assert not use_reference(None, torch.float32)
