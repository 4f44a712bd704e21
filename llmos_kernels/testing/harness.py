"""How a ``Case`` is run and judged, for tests, benchmarks and ``python -m llmos_kernels verify``."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmos_kernels._core.numerics import error_over_budget, judged_together, make_gradients
from llmos_kernels.testing.cases import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(args: Sequence) -> Iterator[Tensor]:
    """The tensors among ``args``."""
    return (a for a in args if isinstance(a, Tensor))


def map_tensors(fn: Callable, args: Sequence) -> tuple:
    """``args`` with ``fn`` applied to each floating point tensor, as a new autograd leaf."""

    def leaf(t):
        return fn(t.detach()).requires_grad_(t.requires_grad)

    is_float = lambda a: isinstance(a, Tensor) and a.is_floating_point()
    return tuple(leaf(a) if is_float(a) else a for a in args)


def cast(args: Sequence, dtype: torch.dtype) -> tuple:
    """The same arguments in another dtype."""
    return map_tensors(lambda t: t.to(dtype, copy=True), args)


def run(fn: Callable, args: Sequence) -> tuple[Tensor, ...]:
    """The outputs of ``fn(*args)`` as a tuple. Every call draws the same dropout."""
    torch.manual_seed(0)
    out = fn(*args)
    return out if isinstance(out, tuple) else (out,)


def run_with_gradients(fn: Callable, args: Sequence, gradients=None) -> dict[str, Tensor]:
    """The outputs of ``fn`` and the gradients of every tensor argument that requires one."""
    outputs = run(fn, args)
    leaves = [a for a in tensors(args) if a.requires_grad]
    gradients = make_gradients(outputs) if gradients is None else gradients
    grads = torch.autograd.grad(
        outputs, leaves, [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    )
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"gradient {i}": g for i, g in enumerate(grads)}


def assert_accurate(actual: Tensor, exact: Tensor, eager: Tensor, what: str) -> None:
    """Fails where ``error_over_budget`` is above 1."""
    ratio = error_over_budget(actual, exact, eager)
    assert ratio <= 1, f"{what}: error is {ratio:.3g} times its budget"


def errors(case: Case, *draws: Sequence, gradients=None) -> dict[str, float]:
    """Error over budget of each output and gradient, of all draws of the arguments together."""
    wide = None if gradients is None else [g.double() for g in gradients]
    results = []
    for args in draws:
        actual = run_with_gradients(case.op, args, gradients)
        exact = run_with_gradients(case.reference, cast(args, torch.float64), wide)
        # Packed: past the end of a row torch's bfloat16 products on AMX read what is there, and NaN stays.
        packed = None if gradients is None else [g.clone() for g in gradients]
        eager = run_with_gradients(case.eager, map_tensors(torch.clone, args), packed)
        results.append({k: (v, exact[k], eager[k]) for k, v in actual.items()})
    return judged_together(results)


def draw(case: Case, shape: tuple, count: int | None = None, **options) -> list[tuple]:
    """Random arguments of ``case``, ``count`` times; by default a small shape's eight times.

    They are to be judged together: the budget is what torch's own result errs, and on few numbers
    that is a matter of luck.
    """
    first = case.make(shape, **options)
    if count is None:
        few = max((t.numel() for t in tensors(first)), default=0) < 1 << 14
        count = 8 if few and not case.row_wise else 1  # Norms take long, and sum few products.
    return [first] + [case.make(shape, **options) for _ in range(count - 1)]


def worst_error(case: Case, shape: tuple, dtype: torch.dtype, device: str) -> float:
    """The largest error over budget that ``case`` makes on random arguments."""
    torch.manual_seed(0)
    draws = draw(case, shape, dtype=dtype, device=device, requires_grad=True)
    return max(errors(case, *draws).values())


class _Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "llmos":
            self.calls.append((op, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return op(*args, **(kwargs or {}))


def raw_calls(case: Case, args: Sequence) -> list[tuple]:
    """The ``llmos`` ops that ``case`` runs forward and backward, with their arguments."""
    with _Record() as record:
        run_with_gradients(case.op, args)
    return record.calls
