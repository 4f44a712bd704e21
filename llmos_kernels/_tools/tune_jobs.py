"""List what ``tune`` measures: launches, how their arguments are made, and candidate settings."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmos_kernels._triton.attention import backward as attention_backward
from llmos_kernels._triton.attention import forward as attention
from llmos_kernels._triton.gemm import linear, linear_backward
from llmos_kernels._triton.int8 import linear as int8
from llmos_kernels._triton.int8.quantize import quantize
from llmos_kernels._triton.norm import layer_norm, layer_norm_backward
from llmos_kernels._triton.runtime import pack_shapes
from llmos_kernels.ops._activations import GELU
from llmos_kernels.ops._attention_arguments import NOT_CAUSAL

#: Returns a tensor of a shape; the caller fixes its dtype, device and contents.
Empty = Callable[..., Tensor]
Settings = dict[str, int]


@dataclass(frozen=True)
class TuningJob:
    """A launch to tune: what it is looked up by, its launcher, and the settings to try."""

    kind: str  # One of ``settings.KINDS``.
    dtype: torch.dtype
    shape: tuple[int, ...]
    launcher: Callable
    make: Callable[[], tuple]  # Returns the arguments of ``launcher``.
    candidates: Sequence[Settings]


def _combinations(names: str, *values: Sequence[int]) -> list[Settings]:
    """Return every combination of the values of each name."""
    return [dict(zip(names.split(), v, strict=True)) for v in itertools.product(*values)]


ROWS = _combinations("ROWS num_warps", (1, 2, 4, 8), (1, 2, 4, 8, 16))
_ATTENTION = "BLOCK_M BLOCK_N num_warps num_stages"
TILES = _combinations(_ATTENTION, (32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
DECODE = _combinations(_ATTENTION, (16,), (32, 64, 128), (2, 4, 8), (2, 3, 4))
_INT8 = "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages"
INT8 = _combinations(_INT8, (64, 128), (64, 128, 256), (64, 128), (4, 8), (3, 4))
_GEMM = f"persistent {_INT8}"
GEMM = _combinations(_GEMM, (0,), (64, 128), (64, 128), (32, 64), (4, 8), (3, 4))
GEMM += _combinations(_GEMM, (1,), (128,), (128, 256), (64,), (8,), (3, 4))
#: For products of at most 16 rows.
GEMV = _combinations(_GEMM, (0,), (16,), (16, 32, 64), (64, 128, 256), (2, 4), (3, 4, 5))


def _with_rows_per_warp(rows: str, dtype: torch.dtype, d: int) -> list[Settings]:
    """Return the ``TILES`` that give each warp 16 rows, so that no warps repeat products.

    All are returned for float32, which may not use tensor cores, and for head dims above 128, where
    such tiles may exceed the registers.
    """
    unrestricted = dtype == torch.float32 or d > 128
    return [c for c in TILES if unrestricted or c[rows] >= 16 * c["num_warps"]]


def _norms(empty: Empty, dtype: torch.dtype) -> Iterator[TuningJob]:
    """Yield the launches of LayerNorm."""
    for d in pack_shapes.WIDTHS:

        def forward(d: int = d) -> tuple:
            weight = empty(d)
            return empty(8192, d), weight, weight, d, 1e-5, True

        def backward(d: int = d) -> tuple:
            x, weight, *_ = forward(d)
            stats = layer_norm.forward(x, weight, weight, d, 1e-5, True)[1]
            return x, None, x, weight, stats, d, True, 0.0, None, True, True

        yield TuningJob("layer_norm", dtype, (d,), layer_norm.forward, forward, ROWS)
        launcher = layer_norm_backward.backward
        yield TuningJob("layer_norm backward", dtype, (d,), launcher, backward, ROWS)


def _attention(empty: Empty, dtype: torch.dtype) -> Iterator[TuningJob]:
    """Yield the launches of attention."""

    def tensors(
        d: int, padded: bool, batch: int = 4, heads: int = 16, queries: int = 2048, keys: int = 2048
    ) -> tuple:
        of = lambda n: empty(batch, n, heads, d).transpose(1, 2)
        q, k, v = of(queries), of(keys), of(keys)
        mask = torch.arange(keys, device=q.device).expand(batch, -1) >= keys * 3 // 4
        return q, k, v, None, mask if padded else None, None, None, None

    def options(d: int, dropout_p: float = 0.0) -> tuple:
        seed = torch.tensor([1, 2], device=empty(1).device)
        return d**-0.5, NOT_CAUSAL, dropout_p, 0.0, seed

    def forward(d: int, load: str) -> tuple:
        return *tensors(d, load != ""), *options(d, 0.1 * (load == " dropout"))

    def backward(d: int, load: str) -> tuple:
        args = forward(d, load)
        return args[0], *args[:8], *attention.forward(*args), *args[8:], False

    def decode(d: int) -> tuple:
        return *tensors(d, False, 8, 32, 1, 4096), *options(d)

    for d in (64, 128, 256):
        by_queries, by_keys = (
            _with_rows_per_warp(rows, dtype, d) for rows in ("BLOCK_M", "BLOCK_N")
        )
        for load in ("", " masked", " dropout"):
            make = functools.partial(forward, d, load)
            kind = f"attention forward{load}"
            yield TuningJob(kind, dtype, (d,), attention.forward, make, by_queries)
            make = functools.partial(backward, d, load)
            for name, tiles in (("dquery", by_queries), ("dkey", by_keys)):
                kind = f"attention {name}{load}"
                yield TuningJob(kind, dtype, (d,), attention_backward.backward, make, tiles)
        make = functools.partial(decode, d)
        yield TuningJob("attention decode", dtype, (d,), attention.forward, make, DECODE)


def _linear(empty: Empty, dtype: torch.dtype) -> Iterator[TuningJob]:
    """Yield the launches of linear layers, and of the gradients of their inputs."""

    def forward(rows: int, d: int, hidden: int) -> tuple:
        return empty(rows, d), empty(hidden, d), empty(hidden), GELU, 0.0, None, False

    def dinput(rows: int, d: int, hidden: int) -> tuple:
        return empty(rows, d), empty(d, hidden), empty(rows, hidden), GELU, 0.0, None

    for rows, (d, hidden) in itertools.product(pack_shapes.ROWS, pack_shapes.FEED_FORWARDS):
        shape, candidates = (rows, hidden, d), GEMV if rows <= 16 else GEMM
        make = functools.partial(forward, rows, d, hidden)
        yield TuningJob("linear", dtype, shape, linear.forward, make, candidates)
        if rows > 16:
            make = functools.partial(dinput, rows, d, hidden)
            yield TuningJob("linear dinput", dtype, shape, linear_backward.dinput, make, candidates)


def _int8(empty: Empty, dtype: torch.dtype) -> Iterator[TuningJob]:
    """Yield the launches of linear layers with an int8 weight."""

    def make(rows: int, d: int, hidden: int, threshold: float) -> tuple:
        weight, scale = quantize(empty(hidden, d))
        return empty(rows, d), weight, scale, None, empty(hidden), GELU, threshold

    gemv = [{k: v for k, v in c.items() if k != "persistent"} for c in GEMV if c["BLOCK_K"] >= 128]
    for rows, (d, hidden) in itertools.product(pack_shapes.ROWS, pack_shapes.FEED_FORWARDS):
        for kind, threshold in (("int8", 0.0), ("int8 outliers", 6.0)):
            args = functools.partial(make, rows, d, hidden, threshold)
            candidates = INT8 if rows > 16 else gemv
            yield TuningJob(kind, dtype, (rows, hidden, d), int8.linear, args, candidates)


#: The jobs of each op that ``--op`` accepts, as functions of (empty, dtype).
OPS: dict[str, Callable[[Empty, torch.dtype], Iterator[TuningJob]]] = {
    "layer_norm": _norms,
    "attention": _attention,
    "linear": _linear,
    "int8": _int8,
}
