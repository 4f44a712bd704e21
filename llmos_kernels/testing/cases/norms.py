"""Cases of LayerNorm and RMS norm. A shape is (*batch, d)."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels._core.registry import KERNEL_DTYPES
from llmos_kernels.ops import layer_norm, rms_norm
from llmos_kernels.ops._dropout import draw_seed
from llmos_kernels.ops._norm import add_residual
from llmos_kernels.testing.cases.case import Case


def _affine(
    shape: tuple[int, ...],
    parameters: int = 2,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return the first ``parameters`` of weight and bias."""
    options["dtype"] = parameter_dtype if parameter_dtype and dtype in KERNEL_DTYPES else dtype
    weight = torch.rand(shape, **options).add(0.5).detach()
    bias = torch.randn(shape, **options).mul(0.1).detach()
    grad = options.get("requires_grad", False)
    return tuple(p.requires_grad_(grad) for p in (weight, bias)[:parameters])


def _make(
    shape: tuple[int, ...],
    tensors: int = 1,
    dims: int = 1,
    parameters: int = 2,
    eps: float | None = 1e-5,
    parameter_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple:
    """Return x, residual (of two ``tensors``), normalized_shape, weight, bias and eps."""
    normalized = tuple(shape[-dims:])
    inputs = tuple(torch.randn(shape, **options) for _ in range(tensors))
    affine = _affine(normalized, parameters, parameter_dtype=parameter_dtype, **options)
    return *inputs, normalized, *affine, *([] if parameters == 0 else [eps])


def _add_eager(
    norm: Callable,
    x: Tensor,
    residual: Tensor,
    normalized_shape: tuple[int, ...],
    *rest: Any,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return ``norm(h)`` and h = residual + dropout(x), with the dropout mask of our kernels."""
    if dropout_p:
        seed = draw_seed(x.device)
        h = add_residual(x, residual, torch.Size(normalized_shape).numel(), dropout_p, seed)
    else:
        h = residual + x
    return norm(h, normalized_shape, *rest), h


def _add_baseline(
    norm: Callable,
    x: Tensor,
    residual: Tensor,
    normalized_shape: tuple[int, ...],
    *rest: Any,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return ``norm(h)`` and h = residual + dropout(x), with torch's dropout."""
    h = residual + F.dropout(x, dropout_p)
    return norm(h, normalized_shape, *rest), h


#: Empty, one element, primes, powers of two and their neighbours, wider than a block.
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
    (1, 66001),
)
BENCHMARK_SHAPES = ((512, 768), (4096, 1024), (32, 384))
GPU_BENCHMARK_SHAPES = ((8192, 4096), (16384, 1024), (4096, 8192))


def _case(
    name: str,
    module: ModuleType,
    op: str,
    eager: Callable,
    *,
    make: dict[str, Any],
    shapes: tuple = SHAPES,
    benchmark_shapes: tuple = (),
    dropout_p: float = 0.0,
) -> Case:
    """Return the case of a norm; ``make`` are the options of ``_make``."""
    reference = getattr(module, f"{op}_reference")
    function = getattr(module, op)
    baseline = None
    if dropout_p:
        baseline = functools.partial(_add_baseline, eager, dropout_p=dropout_p)
    if op.startswith("add_"):
        eager = functools.partial(_add_eager, eager, dropout_p=dropout_p)
    if dropout_p:
        dropout: dict[str, Any] = {"dropout_p": dropout_p, "training": True}
        function = functools.partial(function, **dropout)
        reference = functools.partial(reference, **dropout)
    return Case(
        name,
        function,
        reference,
        eager,
        functools.partial(_make, **make),
        shapes,
        benchmark_shapes,
        GPU_BENCHMARK_SHAPES if benchmark_shapes else (),
        baseline,
    )


_layer = functools.partial(_case, module=layer_norm, eager=F.layer_norm)
_rms = functools.partial(_case, module=rms_norm, eager=F.rms_norm)
_VARIANT_SHAPES = ((5, 31), (2, 3, 129), (2, 20011))

NORMS = (
    _layer("layer_norm", op="layer_norm", make={}, benchmark_shapes=BENCHMARK_SHAPES),
    _layer("layer_norm-plain", op="layer_norm", make={"parameters": 0}, shapes=_VARIANT_SHAPES),
    _layer(
        "layer_norm-weight",
        op="layer_norm",
        make={"parameters": 1, "eps": None},
        shapes=_VARIANT_SHAPES,
    ),
    _layer("layer_norm-2d", op="layer_norm", make={"dims": 2}, shapes=((3, 4, 5), (2, 1, 33, 7))),
    _layer(
        "layer_norm-float32_weight",
        op="layer_norm",
        make={"parameter_dtype": torch.float32},
        shapes=_VARIANT_SHAPES,
    ),
    _layer(
        "add_layer_norm",
        op="add_layer_norm",
        make={"tensors": 2},
        benchmark_shapes=BENCHMARK_SHAPES,
    ),
    _layer(
        "add_layer_norm-dropout",
        op="add_layer_norm",
        make={"tensors": 2},
        dropout_p=0.1,
        benchmark_shapes=BENCHMARK_SHAPES[:2],
    ),
    _rms(
        "rms_norm",
        op="rms_norm",
        make={"parameters": 1, "eps": 1e-6},
        benchmark_shapes=BENCHMARK_SHAPES,
    ),
    _rms("rms_norm-plain", op="rms_norm", make={"parameters": 0}, shapes=_VARIANT_SHAPES),
    _rms(
        "add_rms_norm",
        op="add_rms_norm",
        make={"tensors": 2, "parameters": 1, "eps": 1e-6},
        benchmark_shapes=BENCHMARK_SHAPES,
    ),
    _rms(
        "add_rms_norm-dropout",
        op="add_rms_norm",
        make={"tensors": 2, "parameters": 1, "eps": 1e-6},
        dropout_p=0.1,
        shapes=_VARIANT_SHAPES,
    ),
)
