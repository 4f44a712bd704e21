"""The activations of ``ops/_activations.py`` in Triton, and the kernels that apply them alone.

Bytes: each tensor once.
"""

import torch
import triton
import triton.language as tl

from llmos_kernels._triton import examples
from llmos_kernels._triton.launch import kernel
from llmos_kernels._triton.rows import dropout_arguments, dropout_factors
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
    """The activation of ``z``, float32. NaN passes."""
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
    """The sigmoid and its derivative s (1 - s), in which 1 - s does not cancel."""
    e = tl.exp(-tl.abs(u))
    s = 1 / (1 + e)
    return tl.where(u < 0, e * s, s), e * s * s


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """The derivative of the activation at ``z``, float32; for relu at its result, which has the sign."""
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
def _tile(N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows [ROWS, 1] that a program owns, its first column, and its columns [1, BLOCK]."""
    blocks = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first_col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    return row, first_col, first_col + tl.arange(0, BLOCK)[None, :]


@kernel(do_not_specialize=["M", "threshold"])
def _activation_kernel(kept, seed, out, kept_row, kept_col, M, N, threshold, scale,
                    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, first_col, col = _tile(N, ROWS, BLOCK)
    inside = (row < M) & (col < N)
    z = tl.load(kept + row * kept_row + col * kept_col, inside, 0.0).to(tl.float32)
    y = activate(z, ACTIVATION)
    if seed is not None:
        y *= dropout_factors(seed, row, first_col, threshold, scale, ROWS, BLOCK)
    tl.store(out + row * N + col, y, inside)


@kernel(do_not_specialize=["M", "threshold"])
def _gradient_kernel(dout, kept, seed, dz, dout_row, dout_col, kept_row, kept_col, M, N, threshold,
                     scale, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, first_col, col = _tile(N, ROWS, BLOCK)
    inside = (row < M) & (col < N)
    z = tl.load(kept + row * kept_row + col * kept_col, inside, 0.0).to(tl.float32)
    v = tl.load(dout + row * dout_row + col * dout_col, inside, 0.0).to(tl.float32)
    v *= derivative(z, ACTIVATION)
    if seed is not None:
        v *= dropout_factors(seed, row, first_col, threshold, scale, ROWS, BLOCK)
    tl.store(dz + row * N + col, v, inside)


def dropout_options(dropout_p: float, seed: torch.Tensor | None) -> dict:
    """The arguments of a kernel that drops with ``dropout_factors``, or not."""
    threshold, scale = dropout_arguments(dropout_p)
    return {"seed": seed if dropout_p else None, "threshold": threshold, "scale": scale}


def _blocks(rows: int, cols: int) -> tuple[tuple[int], dict]:
    """Programs, and 16 elements a thread: of one row where that is long, or of several."""
    block = min(max(triton.next_power_of_2(cols), 16), 2048)
    height = 2048 // block
    grid = (triton.cdiv(rows, height) * triton.cdiv(cols, block),)
    return grid, {"M": rows, "N": cols, "ROWS": height, "BLOCK": block, "num_warps": 4}


def forward(kept, activation, dropout_p, seed):
    out = kept.new_empty(kept.shape)
    if out.numel():
        grid, blocks = _blocks(*kept.shape)
        _activation_kernel[grid](
            kept=kept, out=out, kept_row=kept.stride(0), kept_col=kept.stride(1),
            ACTIVATION=activation, **dropout_options(dropout_p, seed), **blocks,
        )  # fmt: skip
    return out


def backward(dout, kept, activation, dropout_p, seed):
    dz = dout.new_empty(dout.shape)
    if dz.numel():
        grid, blocks = _blocks(*dout.shape)
        _gradient_kernel[grid](
            dout=dout, kept=kept, dz=dz, dout_row=dout.stride(0), dout_col=dout.stride(1),
            kept_row=kept.stride(0), kept_col=kept.stride(1), ACTIVATION=activation,
            **dropout_options(dropout_p, seed), **blocks,
        )  # fmt: skip
    return dz


def variants():
    """See ``examples``."""
    for dtype in examples.DTYPES:
        for _, hidden in examples.FEED_FORWARDS:
            z = torch.empty(64, hidden, dtype=dtype)
            for activation in (_activations.RELU, _activations.GELU, _activations.GELU_TANH):
                for p in (0.0, 0.1):
                    yield forward, (z, activation, p, examples.seed())
                    yield backward, (z, z, activation, p, examples.seed())
