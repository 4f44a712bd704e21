"""Triton kernels of a linear layer with activation and dropout.

The formulas are in ``ops/_products.py``. A thread block computes a tile of out, and its epilogue
applies bias, activation and dropout in registers. With split K the kernel that adds the parts
applies the epilogue.

Memory traffic: out and the saved pre-activation are written once, input is read once for each
column of tiles, weight once for each row of tiles. If weight is stored by columns and there are few
rows, only the columns of weight where input is not 0 are read.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.gemm import persistent
from llmos_kernels._triton.gemm.activation import activate, dropout_options
from llmos_kernels._triton.gemm.gemm import (
    add_parts,
    halves,
    multiply,
    new_parts,
    part_and_origin,
    part_plan,
    plan,
    store_part,
)
from llmos_kernels._triton.rows import dropout_factors
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel
from llmos_kernels.ops._activations import GELU, GELU_TANH, NONE, RELU, keeps_input

#: The most rows for which a weight stored by columns is read only where input is not 0.
_SKIP_ROWS = 4


@triton.jit
def _epilogue(acc, bias, seed, out, saved, row, first_col, M, N, threshold, scale,
              ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Store out and saved of rows ``row`` and BLOCK_N columns from ``first_col``.

    It handles 32 columns at a time: activation and dropout of a whole tile take more registers
    than the product, and fewer thread blocks would fit a multiprocessor.
    """
    if BLOCK_N > 32:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _epilogue(
            left,
            bias,
            seed,
            out,
            saved,
            row,
            first_col,
            M,
            N,
            threshold,
            scale,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N // 2,
        )
        _epilogue(
            right,
            bias,
            seed,
            out,
            saved,
            row,
            first_col + BLOCK_N // 2,
            M,
            N,
            threshold,
            scale,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N // 2,
        )
    else:
        col = first_col + tl.arange(0, BLOCK_N)
        inside = (row < M)[:, None] & (col < N)[None, :]
        at = row[:, None] * N + col[None, :]
        if bias is not None:
            acc += tl.load(bias + col, col < N, 0.0).to(tl.float32)[None, :]
        z = acc.to(out.dtype.element_ty)
        if saved is not None:
            tl.store(saved + at, z, inside)
        y = activate(z.to(tl.float32), ACTIVATION)
        if seed is not None:
            y *= dropout_factors(seed, row[:, None], first_col, threshold, scale, BLOCK_M, BLOCK_N)
        tl.store(out + at, y, inside)


@kernel(do_not_specialize=["M", "threshold"])
def _forward_kernel(input, weight, bias, seed, out, saved, partial, M, N, K, PARTS, PART_LENGTH,
                    input_row, input_col, weight_row, weight_col, threshold, scale,
                    ACTIVATION: tl.constexpr, SKIP: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Compute a tile of out and saved, or store its part of a split K in ``partial``."""
    part, first_row, first_col = part_and_origin(M, N, PARTS, BLOCK_M, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    acc = multiply(
        input,
        weight,
        row,
        col,
        part,
        M,
        N,
        K,
        PART_LENGTH,
        input_row,
        input_col,
        weight_col,
        weight_row,
        SKIP,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if partial is not None:
        store_part(partial, acc, part, row, col, M, N)
    else:
        _epilogue(
            acc,
            bias,
            seed,
            out,
            saved,
            row,
            first_col,
            M,
            N,
            threshold,
            scale,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N,
        )


@kernel(do_not_specialize=["M", "threshold"])
def _persistent_forward_kernel(a, b, bias, seed, out, saved, M, N, K, threshold, scale,
                               ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
                               BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Compute the same as ``_forward_kernel``; a and b are descriptors of input and weight."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_row, first_col = persistent.origin(tile, M, N, BLOCK_M, BLOCK_N)
        acc = persistent.multiply(a, b, first_row, first_col, K, True, BLOCK_M, BLOCK_N, BLOCK_K)
        row = first_row + tl.arange(0, BLOCK_M)
        _epilogue(
            acc,
            bias,
            seed,
            out,
            saved,
            row,
            first_col,
            M,
            N,
            threshold,
            scale,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N,
        )


@kernel(do_not_specialize=["M", "PARTS", "threshold"])
def _parts_kernel(partial, bias, seed, out, saved, M, N, PARTS, threshold, scale,
                  ACTIVATION: tl.constexpr, PARTS_AT_ONCE: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """Compute out and saved from the parts of the GEMM."""
    _, first_row, first_col = part_and_origin(M, N, 1, BLOCK_M, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    acc = add_parts(partial, row, col, PARTS, M, N, PARTS_AT_ONCE, BLOCK_M, BLOCK_N)
    _epilogue(
        acc,
        bias,
        seed,
        out,
        saved,
        row,
        first_col,
        M,
        N,
        threshold,
        scale,
        ACTIVATION,
        BLOCK_M,
        BLOCK_N,
    )


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Return out and, if ``save``, the pre-activation: the results of ``llmos::linear_forward``."""
    (m, k), n = input.shape, weight.shape[0]
    out = input.new_empty((m, n))
    saved = input.new_empty((m, n) if save else 0)
    if out.numel() == 0:
        return out, saved
    epilogue = dict(
        bias=None if bias is None else bias.contiguous(),
        out=out,
        saved=saved if save else None,
        M=m,
        N=n,
        ACTIVATION=activation,
        **dropout_options(dropout_p, seed),
    )
    if persistent_plan := persistent.plan("linear", input, weight, transpose_b=True):
        grid, blocks = persistent_plan
        _persistent_forward_kernel[grid](K=k, **epilogue, **blocks)
        return out, saved
    skip = m <= _SKIP_ROWS and weight.stride(0) == 1
    grid, blocks = plan("linear", input, m, n, k, (n if skip else k) % 16 != 0, skip)
    partial = new_parts(input, blocks["PARTS"], m, n)
    _forward_kernel[grid](
        input=input,
        weight=weight,
        partial=partial,
        K=k,
        input_row=input.stride(0),
        input_col=input.stride(1),
        weight_row=weight.stride(0),
        weight_col=weight.stride(1),
        SKIP=skip,
        **epilogue,
        **blocks,
    )
    if partial is not None:
        grid, blocks = part_plan(m, n, blocks["PARTS"])
        _parts_kernel[grid](partial=partial, **epilogue, **blocks)
    return out, saved


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack."""
    for dtype, rows, k, n in pack_shapes.products():
        input, weight, bias = (torch.empty(s, dtype=dtype) for s in ((rows, k), (n, k), n))
        if k < n:
            for activation in (RELU, GELU, GELU_TANH):
                save = keeps_input(activation)
                yield forward, (input, weight, bias, activation, 0.0, None, False)
                for p in (0.0, 0.1) if rows > 16 else ():
                    yield forward, (input, weight, bias, activation, p, pack_shapes.seed(), save)
            yield forward, (input, weight, None, RELU, 0.0, None, False)
        elif rows <= _SKIP_ROWS:
            by_columns = torch.empty(k, n, dtype=dtype).mT
            yield forward, (input, by_columns, bias, NONE, 0.0, None, False)
