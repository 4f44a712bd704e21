"""torch.export neither specialises a dynamic batch or length, nor guards it by a threshold."""

import inspect

import pytest
import torch
from torch import nn
from torch.export import Dim, export

import llmos_kernels as lk
from llmos_kernels.testing import CASES, run, tensors

#: The sizes that are dynamic: traced, and then far from it. (batch, queries, keys) of attention,
#: (batch, length) of rows.
TRACED = {"attention": (3, 9, 12), "rows": (3, 5)}
DISTANT = {"attention": ((1, 1, 2), (40, 3, 7), (2, 130, 300)), "rows": ((1, 1), (2, 1), (40, 130))}


def kind_of(case) -> str:
    return "attention" if case.name.startswith("attention") else "rows"


def shape_of(case, sizes: tuple) -> tuple:
    """Return a shape for ``case.make`` with these dynamic sizes."""
    if kind_of(case) == "rows":
        fixed = case.name.startswith(("linear", "feed_forward")) or case.name.endswith("-2d")
        widths = 2 if fixed else 1
        return (*sizes, *case.small_shape(4)[-widths:])
    batch, heads, *_, dim = case.small_shape(4)
    return (batch if batch == 1 else sizes[0], heads, *sizes[1:], dim)


def dynamic_shapes(given, other) -> tuple:
    """Return which sizes of the tensors ``given`` differ from those of ``other``."""
    return tuple(
        {i: Dim.DYNAMIC for i, (n, m) in enumerate(zip(t.shape, u.shape, strict=True)) if n != m}
        for t, u in zip(given, other, strict=True)
    )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case, strict):
    traced, *others = (
        case.make(shape_of(case, sizes))
        for sizes in (TRACED[kind_of(case)], *DISTANT[kind_of(case)])
    )
    places = [i for i, a in enumerate(traced) if isinstance(a, torch.Tensor)]

    class Model(nn.Module):
        def forward(self, *given):
            args = list(traced)
            for place, tensor in zip(places, given, strict=True):
                args[place] = tensor
            return case.op(*args)

    shapes = dynamic_shapes([*tensors(traced)], [*tensors(others[-1])])
    with torch.no_grad():
        program = export(
            Model(), (*tensors(traced),), dynamic_shapes=(shapes,), strict=strict
        ).module()
        for args in others:
            results = run(program, (*tensors(args),)), run(case.op, args)
            for actual, expected in zip(*results, strict=True):
                assert actual.shape == expected.shape
                if "dropout" not in case.name:
                    torch.testing.assert_close(actual, expected)


class Block(nn.Module):
    """A residual block, as BERT has it."""

    def __init__(self):
        super().__init__()
        self.dense, self.norm, self.dropout = nn.Linear(32, 32), nn.LayerNorm(32), nn.Dropout(0.1)

    def forward(self, hidden_states, input_tensor):
        return self.norm(self.dropout(self.dense(hidden_states)) + input_tensor)


class Decoder(nn.Module):
    """A decoder with memory of its own length, and a causal mask."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, tgt, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        return self.decoder(tgt, memory, tgt_mask=mask, tgt_is_causal=True)


class Encoder(nn.Module):
    """Padded sequences through two layers."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)


class Attention(nn.Module):
    """Attention of queries to keys of another length, with weights."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, query, key):
        return self.attention(query, key, key)


def rows(batch, length):
    return (torch.randn(batch, length, 32),)


def padded(batch, length):
    padding = torch.arange(length) >= torch.arange(batch)[:, None] % length + 1
    return *rows(batch, length), padding


def two(batch, length):
    return *rows(batch, length), *rows(batch, length)


def and_memory(batch, length):
    return *rows(batch, length), *rows(batch, length + 4)


MODULES = {
    "Linear": (lambda: nn.Linear(32, 48), rows),
    "LayerNorm": (lambda: nn.LayerNorm(32), rows),
    "RMSNorm": (lambda: nn.RMSNorm(32), rows),
    "linear and activation": (lambda: nn.Sequential(nn.Linear(32, 48), nn.GELU()), rows),
    "feed-forward": (
        lambda: nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 32)),
        rows,
    ),
    "residual block": (Block, two),
    "MultiheadAttention": (Attention, and_memory),
    "TransformerEncoder": (Encoder, padded),
    "TransformerDecoder": (Decoder, and_memory),
}


@pytest.mark.parametrize(
    ("dtype", "strict"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=str,
)
@pytest.mark.parametrize("name", MODULES)
def test_every_swap(name, dtype, strict):
    """A swapped model exports wherever the stock model does, by the names of its arguments too."""
    make, draw = MODULES[name]
    model = make().eval().to(dtype)
    to_dtype = lambda given: [g.to(dtype) if g.is_floating_point() else g for g in given]
    traced, *others = (to_dtype(draw(n, m)) for n, m in ((3, 5), (1, 2), (40, 3), (2, 130)))
    shapes = dynamic_shapes(traced, others[-1])
    parameters = [*inspect.signature(model.forward).parameters][: len(traced)]

    def exported(by_name):
        if by_name:
            named = dict(zip(parameters, traced, strict=True))
            dynamic = dict(zip(parameters, shapes, strict=True))
            return export(model, (), named, dynamic_shapes=dynamic, strict=strict).module()
        return export(model, (*traced,), dynamic_shapes=shapes, strict=strict).module()

    def calls(program, by_name, args):
        if by_name:
            return run(lambda: program(**dict(zip(parameters, args, strict=True))), ())
        return run(program, args)

    with torch.no_grad():
        stock = exported(by_name=False)
        assert lk.optimize(model, verify=False).swapped
        for by_name in (False, True):
            program = exported(by_name)
            for args in others:
                results = calls(program, by_name, args), calls(stock, False, args)
                for actual, expected in zip(*results, strict=True):
                    assert actual.dtype == dtype
                    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
                    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
