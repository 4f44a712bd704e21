"""Run a ``Case`` and judge its results, for tests, benchmarks and ``verify``."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmos_kernels._core.numerics import HOPELESS, Compared, judged_together, make_gradients
from llmos_kernels.testing.accuracy import DRAWS
from llmos_kernels.testing.cases import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(args: Sequence) -> Iterator[Tensor]:
    """Yield the tensors among ``args``.

    Args:
        args: the arguments of an op; tensors inside of a list are not seen.

    Returns:
        The tensors, in order.
    """
    return (a for a in args if isinstance(a, Tensor))


def map_tensors(fn: Callable, args: Sequence) -> tuple:
    """Return ``args`` with ``fn`` applied to each floating-point tensor, as new autograd leaves.

    Args:
        fn: takes a tensor and returns one.
        args: the arguments of an op.

    Returns:
        The arguments; tensors require a gradient where they did before, others are as they were.
    """

    def leaf(t: Tensor) -> Tensor:
        return fn(t.detach()).requires_grad_(t.requires_grad)

    is_float = lambda a: isinstance(a, Tensor) and a.is_floating_point()
    return tuple(leaf(a) if is_float(a) else a for a in args)


def cast(args: Sequence, dtype: torch.dtype) -> tuple:
    """Return copies of the arguments with the floating-point tensors in another dtype.

    Args:
        args: the arguments of an op.
        dtype: the dtype of the copies.

    Returns:
        The arguments, as from ``map_tensors``.
    """
    return map_tensors(lambda t: t.to(dtype, copy=True), args)


def run(fn: Callable, args: Sequence) -> tuple[Tensor, ...]:
    """Return the outputs of ``fn(*args)`` as a tuple. Every call draws the same dropout mask.

    Args:
        fn: returns a tensor or a tuple of tensors.
        args: its arguments.

    Returns:
        The outputs; of one tensor a tuple of one.
    """
    torch.manual_seed(0)
    out = fn(*args)
    return out if isinstance(out, tuple) else (out,)


def run_with_gradients(
    fn: Callable, args: Sequence, gradients: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the outputs of ``fn`` and the gradient of every argument that requires one, by name.

    Args:
        fn: returns a tensor or a tuple of tensors.
        args: its arguments.
        gradients: the gradients of the outputs; random ones by default.

    Returns:
        "output 0", ... and "gradient 0", ..., in the order of ``args``.
    """
    outputs = run(fn, args)
    leaves = [a for a in tensors(args) if a.requires_grad]
    gradients = make_gradients(outputs) if gradients is None else gradients
    grads = torch.autograd.grad(
        outputs, leaves, [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    )
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"gradient {i}": g for i, g in enumerate(grads)}


def compare(
    case: Case, *draws: Sequence, gradients: Sequence[Tensor] | None = None
) -> list[Compared]:
    """Return each output and gradient of each draw, with what it is judged by.

    Args:
        case: the op, its reference and torch's way.
        draws: arguments for ``case.op``, one sequence a draw.
        gradients: the gradients of the outputs; random ones by default.

    Returns:
        For each draw, by the names of ``run_with_gradients``: our result, the reference's in
        float64, and torch's in the dtype of the arguments.
    """
    wide = None if gradients is None else [g.double() for g in gradients]
    results = []
    for args in draws:
        actual = run_with_gradients(case.op, args, gradients)
        exact = run_with_gradients(case.reference, cast(args, torch.float64), wide)
        # Contiguous copies: torch's bfloat16 products on AMX read past the end of a strided row,
        # and a NaN there reaches the result.
        contiguous = None if gradients is None else [g.clone() for g in gradients]
        eager = run_with_gradients(case.eager, map_tensors(torch.clone, args), contiguous)
        results.append({k: (v, exact[k], eager[k]) for k, v in actual.items()})
    return results


def draw(case: Case, shape: tuple, count: int | None = None, **options: Any) -> list[tuple]:
    """Return ``count`` draws of random arguments of ``case``, to be judged together.

    The budget is the error of torch's own result, which varies at random where there are few
    numbers. By default there are therefore eight draws of a small shape, and one of a large shape.

    Args:
        case: the op.
        shape: one of ``case.shapes``.
        count: the number of draws, or None for the default.
        options: dtype, device and requires_grad, for ``case.make``.

    Returns:
        The arguments of each draw.
    """
    first = case.make(shape, **options)
    if count is None:
        small = max((t.numel() for t in tensors(first)), default=0) < 1 << 14
        # One draw of norms is enough: they sum no long products, and their many shapes take long.
        count = 8 if small and not case.row_wise else 1
    return [first] + [case.make(shape, **options) for _ in range(count - 1)]


def worst_error(case: Case, shape: tuple, dtype: torch.dtype, device: str) -> float:
    """Return the largest error over budget of ``case`` on random arguments.

    Args:
        case: the op.
        shape: one of ``case.shapes``.
        dtype: float32, bfloat16 or float16.
        device: "cpu" or "cuda".

    Returns:
        At most 1 where all outputs and gradients are within their budgets. A miss that chance may
        explain is judged together with more draws, as in the tests.
    """

    def judged(count: int | None) -> float:
        torch.manual_seed(0)
        draws = draw(case, shape, count, dtype=dtype, device=device, requires_grad=True)
        return max(judged_together(compare(case, *draws)).values())

    error = judged(None)
    return judged(DRAWS + 1) if 1 < error <= HOPELESS else error


class OpRecorder(TorchDispatchMode):
    """Record the calls of ``llmos`` ops while it is entered.

    Attributes:
        calls: (op, arguments) of each call, the arguments detached.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(
        self,
        op: torch._ops.OpOverload,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if op.namespace == "llmos":
            self.calls.append((op, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return op(*args, **(kwargs or {}))


def raw_calls(case: Case, args: Sequence) -> list[tuple[torch._ops.OpOverload, tuple]]:
    """Return the ``llmos`` ops that ``case`` runs forward and backward, with their arguments.

    Args:
        case: the op.
        args: arguments for ``case.op``.

    Returns:
        (op, arguments) of each call.
    """
    with OpRecorder() as record:
        run_with_gradients(case.op, args)
    return record.calls
