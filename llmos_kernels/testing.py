"""How a ``Case`` is run, one way to judge error, and one way to time, for tests and benchmarks."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import NormalDist

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmos_kernels.cases import CASES as CASES
from llmos_kernels.cases import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Every fixed seed of tests and proofs is shifted by as many thousands: ``pytest --seed``.
shift = 0


def shifted(seed: int) -> int:
    """A fixed seed, or the one that stands for it in this run."""
    return seed + 1000 * shift


def generator(seed: int) -> torch.Generator:
    """A new generator on the CPU, seeded with ``shifted(seed)``."""
    return torch.Generator().manual_seed(shifted(seed))


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


def make_gradients(outputs: Sequence[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """An incoming gradient for each output: the same numbers whatever their dtype."""
    drawn_by = generator(seed)
    return tuple(
        torch.randn(o.shape, generator=drawn_by, dtype=torch.float64).to(o.device, o.dtype)
        for o in outputs
    )


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


def error_over_budget(actual: Tensor, exact: Tensor, eager: Tensor) -> float:
    """The largest error of ``actual`` over what it may be; 1 or less passes.

    A kernel may err twice as much as torch does in the same dtype, plus one unit in the last place
    of the largest value. Where torch gives NaN or infinity, so must the kernel.
    """
    return _over_budget([_errors_in_ulp(actual, exact, eager)])


def _errors_in_ulp(actual: Tensor, exact: Tensor, eager: Tensor) -> tuple[float, float]:
    """The largest error of ``actual`` and of ``eager``, in units in the last place of the largest
    value. Infinity and 0 where ``actual`` has another form than ``eager``, or is not finite elsewhere.
    """
    wrong = float("inf"), 0.0
    if actual.dtype != eager.dtype or actual.shape != eager.shape:
        return wrong
    if actual.numel() == 0:
        return 0.0, 0.0
    finite = eager.isfinite() & exact.isfinite()
    if not torch.equal(actual.isnan(), eager.isnan()):
        return wrong
    if not torch.equal(actual.isfinite() & exact.isfinite(), finite):
        return wrong
    if not finite.any():
        return 0.0, 0.0
    eps = torch.finfo(actual.dtype).eps
    actual, exact, eager = (t.double() for t in (actual, exact, eager))
    if not finite.all():
        actual, exact, eager = (t[finite] for t in (actual, exact, eager))
    error, allowed = ((t - exact).abs().max().item() for t in (actual, eager))
    ulp = eps * exact.abs().max().item()
    if ulp == 0:  # There is no largest value: twice the error of torch is the unit.
        return (error / (2 * allowed) if allowed else wrong[0] if error else 0.0), 0.0
    return error / ulp, allowed / ulp


def _over_budget(errors: Sequence[tuple[float, float]]) -> float:
    """The sum of some errors over the sum of what they may be."""
    return sum(own for own, _ in errors) / sum(2 * allowed + 1 for _, allowed in errors)


def assert_accurate(actual: Tensor, exact: Tensor, eager: Tensor, what: str) -> None:
    """Fails where ``error_over_budget`` is above 1."""
    ratio = error_over_budget(actual, exact, eager)
    assert ratio <= 1, f"{what}: error is {ratio:.3g} times its budget"


def judged_together(
    draws: Iterable[dict[str, tuple[Tensor, Tensor, Tensor]]],
) -> dict[str, float]:
    """``error_over_budget`` of each named (actual, exact, eager), in the mean of the draws; infinity for
    what is not in all of them."""
    found: dict[str, list[tuple[float, float]]] = {}
    count = 0
    for draw in draws:
        count += 1
        for name, compared in draw.items():
            found.setdefault(name, []).append(_errors_in_ulp(*compared))
    return {k: _over_budget(v) if len(v) == count else math.inf for k, v in found.items()}


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


def samples(
    fns: Sequence[Callable[[], object]],
    rounds: int = 30,
    seconds: float = 4e-3,
    most: float = float("inf"),
    least: int = 5,
) -> list[list[float]]:
    """The times of each function, in seconds, all measured in turn.

    Each round runs every function for about ``seconds``, so that what disturbs the machine
    disturbs all of them alike; there are fewer rounds, at least ``least``, where all would take more
    than ``most`` seconds. On a GPU the device's work is waited for. A function in another process
    measures itself: its ``timed(calls)`` is asked.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None

    def timed(fn, calls):
        if hasattr(fn, "timed"):
            return fn.timed(calls)
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        wait()
        return (time.perf_counter() - start) / calls

    def warmed(fn):
        first = timed(fn, 1)
        return first if first > 0.25 else min(first, timed(fn, 1), timed(fn, 1))

    warm = [warmed(fn) for fn in fns]
    calls = [max(1, round(seconds / t)) for t in warm]
    within = most / sum(t * n for t, n in zip(warm, calls, strict=True))
    times: list[list[float]] = [[] for _ in fns]
    for _ in range(rounds if within >= rounds else min(rounds, max(least, int(within)))):
        for fn, n, taken in zip(fns, calls, times, strict=True):
            taken.append(timed(fn, n))
    return times


def interleaved(
    fns: Sequence[Callable[[], object]], rounds: int = 30, seconds: float = 4e-3
) -> list[float]:
    """The median time of each function, in seconds, by ``samples``."""
    return [statistics.median(t) for t in samples(fns, rounds, seconds)]


def interval(found: Sequence[float]) -> list[float]:
    """Two of the samples between which their median is to be expected, with 95 % confidence or, of fewer
    than six, all there is: order statistics, which ask nothing of how times are spread."""
    listed, n = sorted(found), len(found)
    reach = NormalDist().inv_cdf(0.975) * n**0.5 / 2
    low, high = math.floor(n / 2 - reach), math.ceil(n / 2 + reach)
    return [listed[max(low - 1, 0)], listed[min(high, n - 1)]]


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
