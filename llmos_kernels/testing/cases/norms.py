"""Cases of the normalisations."""

import functools

import torch
import torch.nn.functional as F

from llmos_kernels._core.registry import KERNEL_DTYPES
from llmos_kernels.ops import layer_norm, rms_norm
from llmos_kernels.testing.cases.case import Case


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
    (1, 66001),
)
SIZES = ((512, 768), (4096, 1024), (32, 384))
SIZES_GPU = ((8192, 4096), (16384, 1024), (4096, 8192))


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
        rival=rival,
        gpu_sizes=SIZES_GPU if sizes else (),
    )


_layer = functools.partial(_norm_case, module=layer_norm, eager=F.layer_norm)
_rms = functools.partial(_norm_case, module=rms_norm, eager=F.rms_norm)
_FEW = ((5, 31), (2, 3, 129), (2, 20011))

NORMS = (
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
