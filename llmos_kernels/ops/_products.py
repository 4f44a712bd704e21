"""The matrix products of linear layers, with what is fused into them.

    z = input weight^T + bias,   y = dropout(activation(z))

``input`` is [rows, in], ``weight`` [out, in], ``bias`` [out]. z is rounded to the dtype of
``input`` before the activation, as in torch; sums are float32. The gradients, with f the dropout
factors (0 or 1 / (1 - p)) and ``saved`` the activation's saved tensor (``ops/_activations.py``):

    dz = dy f activation'(saved),   dinput = dz weight,   dweight = dz^T input,   dbias = sum(dz)

Two layers in sequence (``ops/feed_forward.py``) apply f activation' of the first in the epilogue of
the second's dinput, and sum it over rows for the first bias there. The dropout mask is that of
``ops/_dropout.py`` on the rows of y.

``forward``, ``dinput`` and ``parameter_gradients`` ask ``ops/_product_policy.py`` who computes a
product. While a graph is traced they do not ask: they record an op,
``llmos::linear_..._by_policy``, that asks when it runs, so that no threshold is compared with a
symbolic size. On CUDA a traced product with nothing fused is recorded as torch's own: it is
cuBLAS's whatever its size (``tuned/gpu/products.json``), and compilers can fuse what is around it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.compiler import is_dynamo_compiling

from llmos_kernels._core.registry import define, define_composite
from llmos_kernels.ops import _activations
from llmos_kernels.ops._activations import NONE
from llmos_kernels.ops._cpu_facts import ONEDNN
from llmos_kernels.ops._dropout import dropout_reference, keep_mask
from llmos_kernels.ops._product_measurements import (
    DINPUT,
    DINPUT_ACTIVATION,
    DWEIGHT,
    FORWARD,
)
from llmos_kernels.ops._product_policy import OURS, choose

__all__: list[str] = []


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, with sums in float32 or, for float64, in float64."""
    acc = torch.promote_types(a.dtype, torch.float32)
    return a.to(acc) @ b.to(acc)


def transform(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y and z of ``rows`` [rows, in], by differentiable torch ops."""
    z = _product(rows, weight.mT)
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = z.to(rows.dtype)
    return activate_rows(z, activation, dropout_p, seed), z


def activate_rows(z: Tensor, activation: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Return dropout(activation(z)) of ``z`` [rows, out], rounded once; differentiable."""
    acc = torch.promote_types(z.dtype, torch.float32)
    y = _activations.activate(z.to(acc), activation)
    return (y if seed is None else dropout_reference(y, seed, dropout_p)).to(z.dtype)


def slopes(saved: Tensor, activation: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Return f activation'(saved) in the accumulation dtype; differentiable."""
    acc = torch.promote_types(saved.dtype, torch.float32)
    slope = _activations.derivative(saved.to(acc), activation)
    if seed is not None:
        keep = keep_mask(seed, saved.shape[0], saved.shape[1], dropout_p)
        slope = slope * keep / (1 - dropout_p)
    return slope


def _forward_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    y, z = transform(input, weight, bias, activation, dropout_p, seed)
    return y.contiguous(), z.contiguous() if save_z else y.new_empty(0)


def _dinput_reference(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dinput = _product(dz, weight)
    if saved is None:
        return dinput.to(dz.dtype).contiguous(), dz.new_empty(0)
    dinput = dinput * slopes(saved, activation, dropout_p, seed)
    return dinput.to(dz.dtype).contiguous(), dinput.sum(0).to(dz.dtype)


def _dweight_reference(dz: Tensor, input: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    dbias = dz.sum(0, dtype=torch.promote_types(dz.dtype, torch.float32))
    dweight = _product(dz.mT, input).to(dz.dtype)
    return dweight.contiguous(), dbias.to(dz.dtype) if bias else dz.new_empty(0)


def _activation_forward_reference(
    saved: Tensor, activation: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    return activate_rows(saved, activation, dropout_p, seed).contiguous()


def _activation_backward_reference(
    dout: Tensor, saved: Tensor, activation: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    return (dout * slopes(saved, activation, dropout_p, seed)).to(dout.dtype).contiguous()


def _forward_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
    save_z: bool,
    layer: bool = False,
) -> tuple[Tensor, Tensor]:
    shape = input.shape[0], weight.shape[0]
    return input.new_empty(shape), input.new_empty(shape if save_z else 0)


def _dinput_fake(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
    layer: bool = False,
) -> tuple[Tensor, Tensor]:
    dinput = dz.new_empty(dz.shape[0], weight.shape[1])
    return dinput, dz.new_empty(0 if saved is None else weight.shape[1])


def _dweight_fake(
    dz: Tensor, input: Tensor, bias: bool, layer: bool = False
) -> tuple[Tensor, Tensor]:
    dweight = dz.new_empty(dz.shape[1], input.shape[1])
    return dweight, dz.new_empty(dz.shape[1] if bias else 0)


def flops_of_rows(rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of a product of ``rows`` with a weight, or with its transpose."""
    return 2 * rows.shape[0] * weight.numel()


def _flops_of_dweight(dz: Tensor, input: Tensor, *_: Any, **__: Any) -> int:
    return 2 * dz.shape[0] * dz.shape[1] * input.shape[1]


_EPILOGUE = "int activation, float dropout_p, Tensor? seed"
_FORWARD = f"Tensor input, Tensor weight, Tensor? bias, {_EPILOGUE}, bool save_z"
_DINPUT = f"Tensor dz, Tensor weight, Tensor? saved, {_EPILOGUE}"
_DWEIGHT = "Tensor dz, Tensor input, bool bias"

linear_forward = define(
    f"linear_forward({_FORWARD}) -> (Tensor out, Tensor z)",
    reference=_forward_reference,
    fake=_forward_fake,
    triton="gemm.linear:forward",
    flops=flops_of_rows,
)
linear_dinput = define(
    f"linear_dinput({_DINPUT}) -> (Tensor dinput, Tensor dbias)",
    reference=_dinput_reference,
    fake=_dinput_fake,
    triton="gemm.linear_backward:dinput",
    flops=flops_of_rows,
)
linear_dweight = define(
    f"linear_dweight({_DWEIGHT}) -> (Tensor dweight, Tensor dbias)",
    reference=_dweight_reference,
    fake=_dweight_fake,
    triton="gemm.linear_backward:dweight",
    flops=_flops_of_dweight,
)
activation_forward = define(
    f"activation_forward(Tensor saved, {_EPILOGUE}) -> Tensor",
    reference=_activation_forward_reference,
    fake=lambda saved, activation, dropout_p, seed: saved.new_empty(saved.shape),
    triton="gemm.activation:forward",
)
activation_backward = define(
    f"activation_backward(Tensor dout, Tensor saved, {_EPILOGUE}) -> Tensor",
    reference=_activation_backward_reference,
    fake=lambda dout, saved, activation, dropout_p, seed: dout.new_empty(dout.shape),
    triton="gemm.activation:backward",
)

#: Up to so many rows a weight with contiguous columns is read only where the input is not zero: on
#: CPUs, and on GPUs by the CUDA part, which leaves the rest to Triton.
_SPARSE_ROWS = 4
_SPARSE_ON_GPUS = hasattr(torch.ops.llmos, "linear_forward_triton")

#: The activations that oneDNN fuses, as it names them and their algorithm.
_ONEDNN_NAMES = {
    NONE: ("none", ""),
    _activations.RELU: ("relu", ""),
    _activations.GELU: ("gelu", "none"),
    _activations.GELU_TANH: ("gelu", "tanh"),
    _activations.SILU: ("swish", ""),
}


def is_traced(t: Tensor) -> bool:
    """Return True while a graph is traced: by Dynamo, or with fake tensors and symbolic sizes."""
    return (type(t) is not Tensor and is_fake(t)) or is_dynamo_compiling()


def forward(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
    save_z: bool,
    layer: bool = False,
    provider: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return y of ``rows`` [rows, in], and z if ``save_z``.

    ``layer`` says that the product is a whole ``nn.Linear``. ``provider`` is the policy's answer
    where the caller has asked already.
    """
    if seed is not None or save_z:
        provider = OURS  # Nothing else fuses it.
    elif provider is None:
        if is_traced(rows):
            if activation == NONE and rows.is_cuda:  # A compiler can fuse and tune it.
                return F.linear(rows, weight, bias), None
            y, _ = linear_forward_by_policy(
                rows, weight, bias, activation, dropout_p, seed, save_z, layer
            )
            return y, None
        n, (width, depth) = rows.shape[0], weight.shape
        is_sparse = n <= _SPARSE_ROWS and weight.stride(0) == 1 < weight.stride(1)
        if is_sparse and (_SPARSE_ON_GPUS or not rows.is_cuda):
            provider = OURS
        else:
            provider = choose(FORWARD, rows.dtype, rows.device, n, depth, width, layer)
    if provider != OURS:
        if provider == ONEDNN and activation in _ONEDNN_NAMES:
            name, algorithm = _ONEDNN_NAMES[activation]
            y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, name, [], algorithm)
            return y, None
        if activation == NONE:
            return F.linear(rows, weight, bias), None
    y, z = linear_forward(rows, weight, bias, activation, dropout_p, seed, save_z)
    return y, z if save_z else None


def dinput(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
    layer: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return dz weight [rows, in] and an empty tensor.

    With ``saved`` [rows, in], return dz weight f activation'(saved) and its sum over rows [in].
    """
    if is_traced(dz):
        if saved is None and dz.is_cuda:  # A compiler can fuse and tune it.
            return dz @ weight, dz.new_empty(0)
        return linear_dinput_by_policy(dz, weight, saved, activation, dropout_p, seed, layer)
    n, (width, depth) = dz.shape[0], weight.shape
    direction = DINPUT if saved is None else DINPUT_ACTIVATION
    if choose(direction, dz.dtype, dz.device, n, depth, width, layer) == OURS:
        return linear_dinput(dz, weight, saved, activation, dropout_p, seed)
    if not dz.is_cuda:
        dz = dz.contiguous()  # MKL and oneDNN then give the same bits for every layout of dz.
    product = dz @ weight
    if saved is None:
        return product, product.new_empty(0)
    product = activation_backward(product, saved, activation, dropout_p, seed)
    return product, sum_of_rows(product)


def _dweight(dz: Tensor, input: Tensor, of_bias: bool, layer: bool) -> tuple[Tensor, Tensor | None]:
    """Return dweight [out, in] and, if ``of_bias``, dbias [out], by the policy's choice."""
    n, width = dz.shape
    if choose(DWEIGHT, dz.dtype, dz.device, n, input.shape[1], width, layer) == OURS:
        dweight, dbias = linear_dweight(dz, input, of_bias)
        return dweight, dbias if of_bias else None
    if not dz.is_cuda:
        dz, input = dz.contiguous(), input.contiguous()  # As in dinput.
    return dz.mT @ input, sum_of_rows(dz) if of_bias else None


def parameter_gradients(
    dz: Tensor, input: Tensor, of_weight: bool, of_bias: bool, layer: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Return dweight [out, in] and dbias [out], each None unless asked for."""
    if not of_weight:
        return None, sum_of_rows(dz) if of_bias else None
    if not is_traced(dz):
        return _dweight(dz, input, of_bias, layer)
    if dz.is_cuda:  # A compiler can fuse and tune it.
        return dz.mT @ input, sum_of_rows(dz) if of_bias else None
    dweight, dbias = linear_dweight_by_policy(dz, input, of_bias, layer)
    return dweight, dbias if of_bias else None


def _run_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
    save_z: bool,
    layer: bool,
) -> tuple[Tensor, Tensor]:
    y, z = forward(input, weight, bias, activation, dropout_p, seed, save_z, layer)
    return y, y.new_empty(0) if z is None else z


def _run_dweight(dz: Tensor, input: Tensor, bias: bool, layer: bool) -> tuple[Tensor, Tensor]:
    dweight, dbias = _dweight(dz, input, bias, layer)
    return dweight, dz.new_empty(0) if dbias is None else dbias


linear_forward_by_policy = define_composite(
    f"linear_forward_by_policy({_FORWARD}, bool layer) -> (Tensor out, Tensor z)",
    run=_run_forward,
    fake=_forward_fake,
    flops=flops_of_rows,
)
linear_dinput_by_policy = define_composite(
    f"linear_dinput_by_policy({_DINPUT}, bool layer) -> (Tensor dinput, Tensor dbias)",
    run=dinput,
    fake=_dinput_fake,
    flops=flops_of_rows,
)
linear_dweight_by_policy = define_composite(
    f"linear_dweight_by_policy({_DWEIGHT}, bool layer) -> (Tensor dweight, Tensor dbias)",
    run=_run_dweight,
    fake=_dweight_fake,
    flops=_flops_of_dweight,
)


def sum_of_rows(dz: Tensor) -> Tensor:
    """Return the sum over rows, in float32 and rounded once."""
    return dz.sum(0, dtype=torch.promote_types(dz.dtype, torch.float32)).to(dz.dtype)


def linear_gradients(
    dz: Tensor, input: Tensor | None, weight: Tensor | None, of_bias: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dinput, dweight and dbias in ``dtype``, by differentiable torch ops.

    dinput is None without ``weight``, dweight without ``input``.
    """
    dinput = None if weight is None else _product(dz, weight).to(dtype)
    dweight = None if input is None else _product(dz.mT, input).to(dtype)
    acc = torch.promote_types(dtype, torch.float32)
    return dinput, dweight, dz.sum(0, dtype=acc).to(dtype) if of_bias else None


def linear_graph(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return zeros whose gradients are those of ``rows weight^T + bias``.

    A backward that is differentiated itself adds them to the pre-activation that the forward saved.
    The sum has the saved values, even if weight or bias were changed in place since, and passes
    gradients on to ``rows``, ``weight`` and ``bias``.
    """
    z = transform(rows, weight, None, NONE, 0.0, None)[1]
    z = z if bias is None else z + bias
    return (z - z.detach()).where(z.isfinite(), 0)
