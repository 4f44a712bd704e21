"""The activations of ``ops/_activations.py`` in Triton, and the kernels that apply nothing else.

Memory traffic: each tensor is read or written once.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.rows import dropout_arguments, dropout_factors
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel
from llmos_kernels.ops import _activations

_RELU = tl.constexpr(_activations.RELU)
_RELU2 = tl.constexpr(_activations.RELU2)
_GELU = tl.constexpr(_activations.GELU)
_GELU_TANH = tl.constexpr(_activations.GELU_TANH)
_SILU = tl.constexpr(_activations.SILU)

_SQRT_HALF = tl.constexpr(0.5**0.5)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
#: 0.5 (1 + tanh(u)) = sigmoid(2 u), and 2 u = z (_TANH_1 + _TANH_3 z^2).
_TANH_1 = tl.constexpr(2 * 0.7978845608028654)
_TANH_3 = tl.constexpr(2 * 0.7978845608028654 * 0.044715)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Return the activation of ``z``, float32; NaN stays NaN."""
    if ACTIVATION == _RELU:
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == _RELU2:
        z = tl.where(z <= 0, 0.0, z * z)
    elif ACTIVATION == _GELU:
        z *= 0.5 + 0.5 * tl.erf(z * _SQRT_HALF)
    elif ACTIVATION == _GELU_TANH:
        z *= tl.sigmoid(z * (_TANH_1 + _TANH_3 * z * z))
    elif ACTIVATION == _SILU:
        z *= tl.sigmoid(z)
    return z


@triton.jit
def _sigmoid(u):
    """Return s = sigmoid(u) and its derivative s (1 - s), without cancellation in 1 - s."""
    e = tl.exp(-tl.abs(u))
    s = 1 / (1 + e)
    return tl.where(u < 0, e * s, s), e * s * s


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """Return the derivative of the activation at the pre-activation ``z``, float32.

    For relu ``z`` may also be the result of the activation: only its sign matters.
    """
    if ACTIVATION == _RELU:
        z = tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == _RELU2:
        z = 2 * tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == _GELU:
        z = 0.5 + 0.5 * tl.erf(z * _SQRT_HALF) + z * (tl.exp(-0.5 * z * z) * _DENSITY)
    elif ACTIVATION == _GELU_TANH:
        s, slope = _sigmoid(z * (_TANH_1 + _TANH_3 * z * z))
        z = s + z * slope * (_TANH_1 + 3 * _TANH_3 * z * z)
    elif ACTIVATION == _SILU:
        s, slope = _sigmoid(z)
        z = s + z * slope
    else:
        z = tl.full(z.shape, 1.0, tl.float32)
    return z


@triton.jit
def _block_position(N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the thread block's rows [ROWS, 1], its first column and its columns [1, BLOCK]."""
    blocks = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first_col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    return row, first_col, first_col + tl.arange(0, BLOCK)[None, :]


@kernel(do_not_specialize=["M", "threshold"])
def _activation_kernel(saved, seed, out, saved_row, saved_col, M, N, threshold, scale,
                       ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    """Store out = dropout(activation(saved)) of a block of rows and columns."""
    row, first_col, col = _block_position(N, ROWS, BLOCK)
    inside = (row < M) & (col < N)
    z = tl.load(saved + row * saved_row + col * saved_col, inside, 0.0).to(tl.float32)
    y = activate(z, ACTIVATION)
    if seed is not None:
        y *= dropout_factors(seed, row, first_col, threshold, scale, ROWS, BLOCK)
    tl.store(out + row * N + col, y, inside)


@kernel(do_not_specialize=["M", "threshold"])
def _gradient_kernel(dout, saved, seed, dz, dout_row, dout_col, saved_row, saved_col, M, N,
                     threshold, scale, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Store dz = dout * dropout factors * activation'(saved) of a block of rows and columns."""
    row, first_col, col = _block_position(N, ROWS, BLOCK)
    inside = (row < M) & (col < N)
    z = tl.load(saved + row * saved_row + col * saved_col, inside, 0.0).to(tl.float32)
    v = tl.load(dout + row * dout_row + col * dout_col, inside, 0.0).to(tl.float32)
    v *= derivative(z, ACTIVATION)
    if seed is not None:
        v *= dropout_factors(seed, row, first_col, threshold, scale, ROWS, BLOCK)
    tl.store(dz + row * N + col, v, inside)


def dropout_options(dropout_p: float, seed: Tensor | None) -> dict:
    """Return the dropout arguments of a kernel; ``seed`` is None without dropout."""
    threshold, scale = dropout_arguments(dropout_p)
    return {"seed": seed if dropout_p else None, "threshold": threshold, "scale": scale}


def _blocks(rows: int, cols: int) -> tuple[tuple[int], dict]:
    """Return the grid and arguments for 16 elements per thread, of one long row or several rows."""
    block = min(max(triton.next_power_of_2(cols), 16), 2048)
    block_rows = 2048 // block
    grid = (triton.cdiv(rows, block_rows) * triton.cdiv(cols, block),)
    return grid, {"M": rows, "N": cols, "ROWS": block_rows, "BLOCK": block, "num_warps": 4}


def forward(saved: Tensor, activation: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Return dropout(activation(saved)): the result of ``llmos::activation_forward``."""
    out = saved.new_empty(saved.shape)
    if out.numel():
        grid, blocks = _blocks(*saved.shape)
        _activation_kernel[grid](
            saved=saved,
            out=out,
            saved_row=saved.stride(0),
            saved_col=saved.stride(1),
            ACTIVATION=activation,
            **dropout_options(dropout_p, seed),
            **blocks,
        )
    return out


def backward(
    dout: Tensor, saved: Tensor, activation: int, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Return dz of the saved activation: the result of ``llmos::activation_backward``."""
    dz = dout.new_empty(dout.shape)
    if dz.numel():
        grid, blocks = _blocks(*dout.shape)
        _gradient_kernel[grid](
            dout=dout,
            saved=saved,
            dz=dz,
            dout_row=dout.stride(0),
            dout_col=dout.stride(1),
            saved_row=saved.stride(0),
            saved_col=saved.stride(1),
            ACTIVATION=activation,
            **dropout_options(dropout_p, seed),
            **blocks,
        )
    return dz


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack."""
    for dtype in pack_shapes.DTYPES:
        for _, hidden in pack_shapes.FEED_FORWARDS:
            z = torch.empty(64, hidden, dtype=dtype)
            for activation in (_activations.RELU, _activations.GELU, _activations.GELU_TANH):
                for p in (0.0, 0.1):
                    yield forward, (z, activation, p, pack_shapes.seed())
                    yield backward, (z, z, activation, p, pack_shapes.seed())
