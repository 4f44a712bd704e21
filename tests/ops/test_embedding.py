"""Embeddings beyond their Case: indices out of range, padding, saved activations, the module."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmos_kernels as lk
from llmos_kernels._core.registry import DEFINED, HAS_TRITON
from llmos_kernels.testing import DTYPES

HAS_GPU = torch.cuda.is_available()


def sources(device="cpu", dtype=torch.float32, d=48):
    """Return the indices of words [2, 7], types [] and positions [7], and their tables."""
    torch.manual_seed(0)
    tables = [torch.randn(rows, d, dtype=dtype, device=device) for rows in (11, 2, 9)]
    words = torch.randint(11, (2, 7), device=device)
    return [
        words,
        torch.ones((), dtype=torch.int64, device=device),
        torch.arange(7, device=device),
    ], tables


@pytest.mark.parametrize("bad", [-1, 11, 2**40])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_out_of_range_raises_on_the_cpu(bad, backend):
    indices, tables = sources()
    indices[0][1, 3] = bad
    with pytest.raises(IndexError, match="out of range"):
        lk.embedding_layer_norm(indices, tables, backend=backend)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("bad", [-1, 11, 2**40])
@pytest.mark.parametrize("d", [48, 20011])
def test_out_of_range_is_nan_in_triton(bad, d):
    """An index out of range makes its own row NaN, and the gradients that depend on that row."""
    forward, backward = (
        DEFINED[f"llmos::embedding_layer_norm_{name}"].launch for name in ("forward", "backward")
    )
    indices, tables = sources("cuda" if HAS_GPU else "cpu", d=d)
    given = (*indices, *tables)
    expected, stats = forward(*given, None, None, 1e-5, 0.0, None)
    indices[0][1, 3] = bad
    y, stats = forward(*given, None, None, 1e-5, 0.0, None)
    assert y[1, 3].isnan().all() and stats[:, 10].isnan().all()
    y[1, 3] = expected[1, 3]
    assert torch.equal(y, expected)
    dh, _, _ = backward(y, *given, None, stats, 0.0, None, False, False)
    assert dh[1, 3].isnan().all() and dh[0].isfinite().all()


@pytest.mark.skipif(not HAS_GPU, reason="on the CPU the forward has raised")
def test_out_of_range_gradient_on_a_gpu():
    indices, tables = sources("cuda")
    tables = [t.requires_grad_() for t in tables]
    indices[0][1, 3] = 2**40
    lk.embedding_layer_norm(indices, tables).sum().backward()
    assert tables[0].grad[:-1].isfinite().all() and tables[0].grad[-1].isnan().all()


def test_padding_has_no_gradient(device):
    indices, tables = sources(device)
    tables = [t.requires_grad_() for t in tables]
    indices[0][:, :3] = 4
    for padding in (4, 4 - 11):
        y = lk.embedding_layer_norm(indices, tables, padding_idx=(padding, None, 6))
        grads = torch.autograd.grad(y.square().mul(0.5).sum() + y[..., 0].sum(), tables)
        assert (grads[0][4] == 0).all() and (grads[2][6] == 0).all()
        assert (grads[0][indices[0][:, 3:]] != 0).any() and (grads[2][:6] != 0).any()


def test_any_shapes_that_broadcast(device):
    _, tables = sources(device)
    column, row = torch.tensor([[1], [5], [7]], device=device), torch.tensor([1, 0], device=device)
    y = lk.embedding_layer_norm([column, row.int()], tables[:2])
    h = F.embedding(column, tables[0]) + F.embedding(row, tables[1])
    torch.testing.assert_close(y, F.layer_norm(h, (48,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_and_reference_drop_the_same(dtype):
    op = DEFINED["llmos::embedding_layer_norm_forward"]
    call = torch.ops.llmos.embedding_layer_norm_forward.default
    for kernel in (call, op.launch) if HAS_TRITON else (call,):
        device = "cuda" if HAS_GPU and kernel is op.launch else "cpu"
        indices, tables = sources(device, dtype, d=1003)
        args = *indices, *tables, None, None, 1e-5, 0.3, torch.tensor([5, 6], device=device)
        y, expected = kernel(*args)[0], op.reference(*args)[0]
        assert torch.equal(y == 0, expected == 0) and 0.25 < (y == 0).double().mean() < 0.35


def test_nothing_of_the_size_of_y_is_kept(device):
    indices, tables = sources(device)
    tables = [t.requires_grad_() for t in tables]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lk.embedding_layer_norm(indices, tables, dropout_p=0.5, training=True)
    ours = {t.data_ptr() for t in tables}
    assert max(t.numel() for t in kept if t.data_ptr() not in ours) < y.numel() // 8


BAD = {
    "expected one to 3": (ValueError, lambda i, t: (i[:2], t)),
    "must broadcast": (ValueError, lambda i, t: ([i[0], i[0].mT, i[2]], t)),
    r"indices\[1\] must be int64 or int32, got torch.float32": (
        TypeError,
        lambda i, t: ([i[0], i[1].float(), i[2]], t),
    ),
    r"tables\[2\] must be torch.float32": (TypeError, lambda i, t: (i, [*t[:2], t[2].half()])),
    r"\[9, 40\]": (ValueError, lambda i, t: (i, [*t[:2], t[2][:, :40]])),
    "tables.*meta": (ValueError, lambda i, t: (i, [*t[:2], t[2].to("meta")])),
    r"weight must have shape \[48\], got \[7\]": (ValueError, lambda i, t: (i, t, torch.ones(7))),
    "dropout_p.*1.5": (ValueError, lambda i, t: (i, t, None, None, 1e-5, 1.5)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_calls_name_the_value(message):
    error, arguments = BAD[message]
    with pytest.raises(error, match=message):
        lk.embedding_layer_norm(*arguments(*sources()))


def test_bad_padding():
    for padding in ((11, None, None), (-12, None, None), (0,)):
        with pytest.raises(ValueError, match=str(padding[0])):
            lk.embedding_layer_norm(*sources(), padding_idx=padding)


class Explicit(nn.Module):
    """BERT's embeddings as Hugging Face writes them."""

    def __init__(self):
        super().__init__()
        self.word_embeddings = nn.Embedding(31, 24, padding_idx=0)
        self.position_embeddings = nn.Embedding(16, 24)
        self.token_type_embeddings = nn.Embedding(2, 24)
        self.LayerNorm = nn.LayerNorm(24, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, input_ids, token_type_ids, position_ids):
        h = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        h = h + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(h))


def test_bert_embedding(device):
    stock, ours = Explicit().to(device), lk.nn.BertEmbedding(31, 24, 16).to(device)
    ours.load_state_dict(stock.state_dict())
    ids = torch.randint(31, (3, 9), device=device)
    ids[:, 7:] = 0
    types, positions = ids % 2, torch.arange(9, device=device)
    for module in (stock, ours):
        module.eval()(ids, types, positions[None]).square().sum().backward()
    torch.testing.assert_close(ours(ids, types), stock(ids, types, positions))
    torch.testing.assert_close(ours(ids), stock(ids, torch.zeros_like(ids), positions))
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert (ours.train()(ids) == 0).any()
