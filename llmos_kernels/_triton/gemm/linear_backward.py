"""Triton kernels of the gradients of a linear layer; the formulas are in ``ops/_products.py``.

The epilogue of dinput multiplies it by the derivative of the activation that made the input, and
stores its column sums over each tile, for the gradient of the bias of the layer before. In dweight,
the thread blocks whose tiles have the same rows share the work of summing dout for dbias. There are
no atomics: a second kernel adds all partial sums in a fixed order.

Memory traffic: dinput and dweight are written once, the saved activation is read once, dout once
for each column of tiles.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_kernels._triton.gemm import persistent
from llmos_kernels._triton.gemm.activation import derivative, dropout_options
from llmos_kernels._triton.gemm.gemm import (
    add_parts,
    halves,
    multiply,
    new_parts,
    part_and_origin,
    part_plan,
    part_span,
    plan,
    store_part,
    sum_parts,
)
from llmos_kernels._triton.rows import dropout_factors
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels._triton.runtime.launch import kernel
from llmos_kernels.ops._activations import GELU, GELU_TANH, RELU


@triton.jit
def _epilogue(acc, saved, seed, dinput, sums, row, first_row, first_col, M, N, saved_row, saved_col,
              threshold, scale, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """Store dinput of rows ``row`` and BLOCK_N columns from ``first_col``, and its column sums.

    Without a saved activation dinput is ``acc`` alone and there are no sums.
    """
    if BLOCK_N > 32:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _epilogue(
            left,
            saved,
            seed,
            dinput,
            sums,
            row,
            first_row,
            first_col,
            M,
            N,
            saved_row,
            saved_col,
            threshold,
            scale,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N // 2,
        )
        _epilogue(
            right,
            saved,
            seed,
            dinput,
            sums,
            row,
            first_row,
            first_col + BLOCK_N // 2,
            M,
            N,
            saved_row,
            saved_col,
            threshold,
            scale,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N // 2,
        )
    else:
        col = first_col + tl.arange(0, BLOCK_N)
        inside = (row < M)[:, None] & (col < N)[None, :]
        if saved is not None:
            if seed is not None:
                acc *= dropout_factors(
                    seed, row[:, None], first_col, threshold, scale, BLOCK_M, BLOCK_N
                )
            z = tl.load(saved + row[:, None] * saved_row + col[None, :] * saved_col, inside, 0.0)
            acc *= derivative(z.to(tl.float32), ACTIVATION)
            total = tl.sum(tl.where(inside, acc, 0.0), 0)
            tl.store(sums + first_row // BLOCK_M * N + col, total, col < N)
        tl.store(dinput + row[:, None] * N + col[None, :], acc, inside)


@kernel(do_not_specialize=["M", "threshold"])
def _dinput_kernel(dout, weight, saved, seed, dinput, sums, partial, M, N, K, PARTS, PART_LENGTH,
                   dout_row, dout_col, weight_row, weight_col, saved_row, saved_col, threshold,
                   scale, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr):  # fmt: skip
    """Compute a tile of dinput and its column sums, or its part of a split K."""
    part, first_row, first_col = part_and_origin(M, N, PARTS, BLOCK_M, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    acc = multiply(
        dout,
        weight,
        row,
        col,
        part,
        M,
        N,
        K,
        PART_LENGTH,
        dout_row,
        dout_col,
        weight_row,
        weight_col,
        False,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if partial is not None:
        store_part(partial, acc, part, row, col, M, N)
    else:
        _epilogue(
            acc,
            saved,
            seed,
            dinput,
            sums,
            row,
            first_row,
            first_col,
            M,
            N,
            saved_row,
            saved_col,
            threshold,
            scale,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N,
        )


@kernel(do_not_specialize=["M", "threshold"])
def _persistent_dinput_kernel(a, b, saved, seed, dinput, sums, M, N, K, saved_row, saved_col,
                              threshold, scale, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
                              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Compute the same as ``_dinput_kernel``; a and b are descriptors of dout and weight."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_row, first_col = persistent.origin(tile, M, N, BLOCK_M, BLOCK_N)
        acc = persistent.multiply(a, b, first_row, first_col, K, False, BLOCK_M, BLOCK_N, BLOCK_K)
        row = first_row + tl.arange(0, BLOCK_M)
        _epilogue(
            acc,
            saved,
            seed,
            dinput,
            sums,
            row,
            first_row,
            first_col,
            M,
            N,
            saved_row,
            saved_col,
            threshold,
            scale,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N,
        )


@kernel(do_not_specialize=["M", "PARTS", "threshold"])
def _parts_kernel(partial, saved, seed, dinput, sums, M, N, PARTS, saved_row, saved_col, threshold,
                  scale, ACTIVATION: tl.constexpr, PARTS_AT_ONCE: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Compute dinput and its column sums from the parts of the GEMM."""
    _, first_row, first_col = part_and_origin(M, N, 1, BLOCK_M, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    acc = add_parts(partial, row, col, PARTS, M, N, PARTS_AT_ONCE, BLOCK_M, BLOCK_N)
    _epilogue(
        acc,
        saved,
        seed,
        dinput,
        sums,
        row,
        first_row,
        first_col,
        M,
        N,
        saved_row,
        saved_col,
        threshold,
        scale,
        ACTIVATION,
        BLOCK_M,
        BLOCK_N,
    )


@triton.jit
def _sum_columns(dout, sums, row, part, piece, PIECES, M, K, PART_LENGTH, dout_row, dout_col,
                 BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Store the sums of columns ``row`` of dout over one of PIECES pieces of a part of its rows."""
    first, length, rest = part_span(part, K, PART_LENGTH)
    piece_length = tl.cdiv(tl.cdiv(length, BLOCK_K), PIECES) * BLOCK_K
    k = tl.arange(0, BLOCK_K)
    dout += row[:, None] * dout_col
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    stop = tl.minimum((piece + 1) * piece_length, length)
    for start in tl.range(piece * piece_length, stop, BLOCK_K, num_stages=4):
        at = dout + (first + start + k)[None, :] * dout_row
        total += tl.load(at, (row < M)[:, None] & (k < rest - start)[None, :], 0.0).to(tl.float32)
    at = (part.to(tl.int64) * PIECES + piece) * M + row
    tl.store(sums + at, tl.sum(total, 1), row < M)


@kernel(do_not_specialize=["K"])
def _dweight_kernel(dout, input, dweight, sums, partial, M, N, K, PARTS, PART_LENGTH,
                    dout_row, dout_col, input_row, input_col, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Compute a tile of dweight, or its part of a split K, and a piece of the sums of dout."""
    part, first_row, first_col = part_and_origin(M, N, PARTS, BLOCK_M, BLOCK_N)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    if sums is not None:
        _sum_columns(
            dout,
            sums,
            row,
            part,
            (first_col // BLOCK_N).to(tl.int32),
            tl.cdiv(N, BLOCK_N),
            M,
            K,
            PART_LENGTH,
            dout_row,
            dout_col,
            BLOCK_M,
            BLOCK_K,
        )
    acc = multiply(
        dout,
        input,
        row,
        col,
        part,
        M,
        N,
        K,
        PART_LENGTH,
        dout_col,
        dout_row,
        input_row,
        input_col,
        False,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if partial is not None:
        store_part(partial, acc, part, row, col, M, N)
    else:
        inside = (row < M)[:, None] & (col < N)[None, :]
        tl.store(dweight + row[:, None] * N + col[None, :], acc, inside)


def dinput(
    dout: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the results of ``llmos::linear_dinput``: dinput, and dbias of the layer before.

    Without a saved activation dinput is the product alone, and dbias is empty.
    """
    (m, k), n = dout.shape, weight.shape[1]
    out = dout.new_empty((m, n))
    dbias = dout.new_empty(0 if saved is None else n)
    if out.numel() == 0:
        return out, dbias.zero_()
    persistent_plan = persistent.plan("linear dinput", dout, weight, transpose_b=False)
    odd = (n | k) % 16 != 0
    grid, blocks = persistent_plan or plan("linear dinput", dout, m, n, k, odd)
    # The parts of a split K, and the launch of the kernel that applies the epilogue.
    partial = None if persistent_plan else new_parts(dout, blocks["PARTS"], m, n)
    epilogue_grid, epilogue_blocks = grid, blocks
    if partial is not None:
        epilogue_grid, epilogue_blocks = part_plan(m, n, blocks["PARTS"])
    sums, saved_row, saved_col = None, 0, 0
    if saved is not None:
        sums = new_parts(dout, triton.cdiv(m, epilogue_blocks["BLOCK_M"]), n)
        saved_row, saved_col = saved.stride()
    epilogue = dict(
        saved=saved,
        dinput=out,
        sums=dbias if sums is None else sums,
        M=m,
        N=n,
        saved_row=saved_row,
        saved_col=saved_col,
        ACTIVATION=activation,
        **dropout_options(dropout_p, seed),
    )
    if persistent_plan:
        _persistent_dinput_kernel[grid](K=k, **epilogue, **blocks)
    else:
        _dinput_kernel[grid](
            dout=dout,
            weight=weight,
            partial=partial,
            K=k,
            dout_row=dout.stride(0),
            dout_col=dout.stride(1),
            weight_row=weight.stride(0),
            weight_col=weight.stride(1),
            **epilogue,
            **blocks,
        )
    if partial is not None:
        _parts_kernel[epilogue_grid](partial=partial, **epilogue, **epilogue_blocks)
    if sums is not None:
        sum_parts(sums, dbias)
    return out, dbias


def dweight(dout: Tensor, input: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Return dweight and, if ``bias``, dbias: the results of ``llmos::linear_dweight``."""
    (k, m), n = dout.shape, input.shape[1]
    out = dout.new_empty((m, n))
    dbias = dout.new_empty(m if bias else 0)
    if out.numel() == 0:  # There is no tile, hence no thread block that could sum dout.
        return out, dout.sum(0, dtype=torch.float32).to(dout.dtype) if bias else dbias
    grid, blocks = plan("linear dweight", dout, m, n, k, (m | n) % 16 != 0)
    partial = new_parts(dout, blocks["PARTS"], m, n)
    sums = new_parts(dout, blocks["PARTS"] * triton.cdiv(n, blocks["BLOCK_N"]), m) if bias else None
    sums_out = dbias if bias and sums is None else sums
    _dweight_kernel[grid](
        dout=dout,
        input=input,
        dweight=out,
        sums=sums_out,
        partial=partial,
        M=m,
        N=n,
        K=k,
        dout_row=dout.stride(0),
        dout_col=dout.stride(1),
        input_row=input.stride(0),
        input_col=input.stride(1),
        **blocks,
    )
    if partial is not None:
        sum_parts(partial, out)
    if sums is not None:
        sum_parts(sums, dbias)
    return out, dbias


def variants() -> Iterator[tuple[Callable, tuple]]:
    """Yield launchers and arguments; the kernels that they launch are compiled into the pack.

    ``dweight`` is not among them: with nothing fused, cuBLAS computes it on a GPU.
    """
    for dtype, rows, k, n in pack_shapes.products():
        if k < n and rows > 16:
            dout, weight, saved = (
                torch.empty(s, dtype=dtype) for s in ((rows, k), (k, n), (rows, n))
            )
            for activation in (RELU, GELU, GELU_TANH):
                for p in (0.0, 0.1):
                    yield dinput, (dout, weight, saved, activation, p, pack_shapes.seed())
