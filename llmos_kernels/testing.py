"""One table of cases that tests and benchmarks share, and one way to judge error.

A ``Case`` is all that a new op adds here: how to call it, its reference, what torch users write
today, and shapes. ``tests/test_ops.py`` and ``benchmarks/bench_ops.py`` do the rest.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmos_kernels._registry import KERNEL_DTYPES
from llmos_kernels.ops import layer_norm, rms_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """How to call one op. ``make(shape, **options)`` returns its positional arguments."""

    name: str
    op: Callable
    reference: Callable
    eager: Callable  # What is written with torch alone: the error budget and the benchmark.
    make: Callable[..., tuple]
    shapes: tuple  # Small and awkward: tests.
    sizes: tuple = ()  # Of real models: benchmarks.
    rival: Callable | None = None  # What benchmarks time instead of an eager that draws our mask.

    def __str__(self) -> str:
        return self.name


def _affine(shape, parameters=2, dtype=torch.float32, parameter_dtype=None, **options):
    options["dtype"] = parameter_dtype if parameter_dtype and dtype in KERNEL_DTYPES else dtype
    weight = torch.rand(shape, **options).add(0.5).detach()
    bias = torch.randn(shape, **options).mul(0.1).detach()
    grad = options.get("requires_grad", False)
    return tuple(p.requires_grad_(grad) for p in (weight, bias)[:parameters])


def _norm_args(shape, tensors=1, dims=1, parameters=2, eps=1e-5, parameter_dtype=None, **options):
    normalized = tuple(shape[-dims:])
    inputs = tuple(torch.randn(shape, **options) for _ in range(tensors))
    affine = _affine(normalized, parameters, parameter_dtype=parameter_dtype, **options)
    return *inputs, normalized, *affine, *([] if parameters == 0 else [eps])


def _add_eager(norm, x, residual, normalized_shape, *rest, dropout_p=0.0):
    if dropout_p:
        seed = layer_norm.draw_seed(x.device)
        h = layer_norm.add_residual(
            x, residual, torch.Size(normalized_shape).numel(), dropout_p, seed
        )
    else:
        h = residual + x
    return norm(h, normalized_shape, *rest), h


def _add_rival(norm, x, residual, normalized_shape, *rest, dropout_p):
    h = residual + F.dropout(x, dropout_p)
    return norm(h, normalized_shape, *rest), h


#: Empty, one, primes, powers of two and their neighbours, wider than a block.
SHAPES = (
    (0, 8),
    (3, 0),
    (3, 1),
    (1, 64),
    (5, 31),
    (2, 3, 129),
    (4, 255),
    (3, 256),
    (2, 257),
    (7, 1000),
    (97, 48),
    (3, 8200),
    (2, 20011),
    (1, 131072),
)
SIZES = ((512, 768), (4096, 1024), (32, 384))


def _norm_case(name, module, op, eager, *, sizes=(), shapes=SHAPES, make=None, dropout_p=0.0):
    reference = getattr(module, f"{op}_reference")
    function = getattr(module, op)
    rival = functools.partial(_add_rival, eager, dropout_p=dropout_p) if dropout_p else None
    if op.startswith("add_"):
        eager = functools.partial(_add_eager, eager, dropout_p=dropout_p)
    if dropout_p:
        drop = {"dropout_p": dropout_p, "training": True}
        function = functools.partial(function, **drop)
        reference = functools.partial(reference, **drop)
    return Case(
        name,
        function,
        reference,
        eager,
        functools.partial(_norm_args, **make),
        shapes,
        sizes,
        rival,
    )


_layer = functools.partial(_norm_case, module=layer_norm, eager=F.layer_norm)
_rms = functools.partial(_norm_case, module=rms_norm, eager=F.rms_norm)
_FEW = ((5, 31), (2, 3, 129), (2, 20011))

CASES = (
    _layer("layer_norm", op="layer_norm", make={}, sizes=SIZES),
    _layer("layer_norm-plain", op="layer_norm", make={"parameters": 0}, shapes=_FEW),
    _layer("layer_norm-weight", op="layer_norm", make={"parameters": 1, "eps": None}, shapes=_FEW),
    _layer("layer_norm-2d", op="layer_norm", make={"dims": 2}, shapes=((3, 4, 5), (2, 1, 33, 7))),
    _layer(
        "layer_norm-float32_weight",
        op="layer_norm",
        make={"parameter_dtype": torch.float32},
        shapes=_FEW,
    ),
    _layer("add_layer_norm", op="add_layer_norm", make={"tensors": 2}, sizes=SIZES),
    _layer(
        "add_layer_norm-dropout",
        op="add_layer_norm",
        make={"tensors": 2},
        dropout_p=0.1,
        sizes=SIZES[:2],
    ),
    _rms("rms_norm", op="rms_norm", make={"parameters": 1, "eps": 1e-6}, sizes=SIZES),
    _rms("rms_norm-plain", op="rms_norm", make={"parameters": 0}, shapes=_FEW),
    _rms(
        "add_rms_norm",
        op="add_rms_norm",
        make={"tensors": 2, "parameters": 1, "eps": 1e-6},
        sizes=SIZES,
    ),
    _rms(
        "add_rms_norm-dropout",
        op="add_rms_norm",
        make={"tensors": 2, "parameters": 1, "eps": 1e-6},
        dropout_p=0.1,
        shapes=_FEW,
    ),
)


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
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype)
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
    if actual.dtype != eager.dtype or actual.shape != eager.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    finite = eager.isfinite() & exact.isfinite()
    if not torch.equal(actual.isnan(), eager.isnan()):
        return float("inf")
    if not torch.equal(actual.isfinite() & exact.isfinite(), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    eps = torch.finfo(actual.dtype).eps
    actual, exact, eager = (t.double()[finite] for t in (actual, exact, eager))
    ulp = eps * exact.abs().max().item()
    budget = 2 * (eager - exact).abs().max().item() + ulp
    error = (actual - exact).abs().max().item()
    return error / budget if error else 0.0


def assert_accurate(actual: Tensor, exact: Tensor, eager: Tensor, what: str) -> None:
    """Fails where ``error_over_budget`` is above 1."""
    ratio = error_over_budget(actual, exact, eager)
    assert ratio <= 1, f"{what}: error is {ratio:.3g} times its budget"


def errors(case: Case, args: Sequence, gradients=None) -> dict[str, float]:
    """Error over budget of each output and gradient of one call."""
    actual = run_with_gradients(case.op, args, gradients)
    wide = None if gradients is None else [g.double() for g in gradients]
    exact = run_with_gradients(case.reference, cast(args, torch.float64), wide)
    eager = run_with_gradients(case.eager, args, gradients)
    return {k: error_over_budget(v, exact[k], eager[k]) for k, v in actual.items()}


def worst_error(case: Case, shape: tuple, dtype: torch.dtype, device: str) -> float:
    """The largest error over budget that ``case`` makes on random arguments."""
    torch.manual_seed(0)
    return max(
        errors(case, case.make(shape, dtype=dtype, device=device, requires_grad=True)).values()
    )


def interleaved(
    fns: Sequence[Callable[[], object]], rounds: int = 30, seconds: float = 4e-3
) -> list[float]:
    """The median time of each function, in seconds, all measured in turn.

    Each round runs every function for about ``seconds``, so that what disturbs the machine
    disturbs all of them alike. On a GPU the device's work is waited for.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None

    def timed(fn, calls):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        wait()
        return (time.perf_counter() - start) / calls

    warm = [min(timed(fn, 1) for _ in range(3)) for fn in fns]
    calls = [max(1, round(seconds / t)) for t in warm]
    times: list[list[float]] = [[] for _ in fns]
    for _ in range(rounds):
        for fn, n, taken in zip(fns, calls, times, strict=True):
            taken.append(timed(fn, n))
    return [statistics.median(t) for t in times]


class _Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "llmos":
            self.calls.append((op, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return op(*args, **(kwargs or {}))


def raw_calls(case: Case, shape: tuple, **options) -> list[tuple]:
    """The ``llmos`` ops that ``case`` runs forward and backward, with their arguments."""
    args = case.make(shape, requires_grad=True, **options)
    with _Record() as record:
        run_with_gradients(case.op, args)
    return record.calls
