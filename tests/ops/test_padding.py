"""unpad_input and pad_input, beyond what every op is tested for."""

import pytest
import torch

import llmos_kernels as lk

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]],
    "none": [[1] * 4] * 3,
    "nothing in a row": [[0] * 4, [1, 1, 0, 0], [0] * 4],
    "one token": [[0, 0, 1, 0]],
    "no tokens": [[0] * 4] * 2,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64])
def test_tokens_come_out_and_go_back(mask, dtype, device):
    mask = torch.tensor(MASKS[mask], device=device).to(dtype)
    x = torch.randn(*mask.shape, 2, 3, device=device)
    x[mask == 0] = float("nan")
    x.requires_grad_()
    tokens, indices, cu_seqlens, longest = lk.unpad_input(x, mask)
    lengths = (mask != 0).sum(1)
    assert torch.equal(tokens, x[mask != 0])
    assert cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert cu_seqlens.dtype == torch.int32 and longest == max(lengths.tolist())
    padded = lk.pad_input(tokens * 2, indices, *mask.shape)
    assert torch.equal(padded, torch.where((mask != 0)[..., None, None], 2 * x, 0.0))
    padded.sum().backward()
    expected = torch.where((mask != 0)[..., None, None], 2.0, 0.0).expand_as(x)
    assert torch.equal(x.grad, expected), "padding has a gradient"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.bfloat16])
def test_any_dtype_and_strides(dtype, device):
    mask = torch.tensor(MASKS["left"], device=device)
    ids = torch.randint(0, 2, (4, 3), device=device).to(dtype).T
    tokens, indices, *_ = lk.unpad_input(ids, mask)
    assert torch.equal(tokens, ids[mask == 1]) and tokens.dtype == dtype
    back = lk.pad_input(tokens[None].expand(2, -1)[1], indices, 3, 4)
    assert torch.equal(back, ids * mask if dtype != torch.bool else ids & (mask == 1))
    wide = torch.ones(3, 4, 0, device=device, dtype=dtype)
    assert lk.unpad_input(wide, mask).tokens.shape == (8, 0)


def test_a_given_number_of_rows(device):
    mask = torch.tensor(MASKS["holes"], device=device)
    x = torch.randn(3, 4, 8, device=device, requires_grad=True)
    tokens, indices, cu_seqlens, _ = lk.unpad_input(x, mask, max_tokens=9)
    assert indices.tolist()[5:] == [-1] * 4 and cu_seqlens.tolist() == [0, 2, 4, 5, 9]
    assert torch.equal(tokens[:5], x[mask == 1]) and not tokens[5:].any()
    heads = tokens.view(9, 2, 4)
    cu = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    out = lk.scaled_dot_product_attention(heads, heads, heads, **cu)
    padded = lk.pad_input(out, indices, 3, 4)
    q = x.view(3, 4, 2, 4).transpose(1, 2)
    expected = lk.scaled_dot_product_attention(q, q, q, key_padding_mask=mask == 0)
    expected = expected.transpose(1, 2) * mask[..., None, None]
    torch.testing.assert_close(padded, expected)
    if device == "cpu":
        with pytest.raises(ValueError, match="there are 5 tokens, more than max_tokens=4"):
            lk.unpad_input(x, mask, max_tokens=4)


def test_one_graph_for_all_fills(device):
    def block(x, mask, weight):
        tokens, indices, cu, _ = lk.unpad_input(x, mask, max_tokens=12)
        tokens = lk.linear(lk.layer_norm(tokens, (8,)), weight)
        heads = tokens.view(12, 2, 4)
        out = lk.scaled_dot_product_attention(heads, heads, heads, cu_seqlens_q=cu, cu_seqlens_k=cu)
        return lk.pad_input(out, indices, 3, 4)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    weight = torch.randn(8, 8, device=device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mask in (MASKS[name] for name in ("right", "left", "holes", "none")):
            mask, x = torch.tensor(mask, device=device), torch.randn(3, 4, 8, device=device)
            torch.testing.assert_close(compiled(x, mask, weight), block(x, mask, weight))


X, M = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.int64)
BAD = {
    "mask of two": (lambda: lk.unpad_input(X, M * 2), ValueError, "6 values are neither"),
    "negative": (lambda: lk.unpad_input(X, -M), ValueError, "6 values are neither"),
    "float": (lambda: lk.unpad_input(X, M.float()), TypeError, "torch.float32"),
    "shape": (lambda: lk.unpad_input(X, M[:, :2]), ValueError, r"\[2, 3, 8\] and \[2, 2\]"),
    "one dimension": (lambda: lk.unpad_input(X[0], M[0]), ValueError, r"\[batch, length\]"),
    "max_tokens": (lambda: lk.unpad_input(X, M, max_tokens=-1), ValueError, "got -1"),
    "not as many": (lambda: lk.pad_input(X[0], torch.arange(2), 2, 3), ValueError, r"\[2\]"),
    "int32": (lambda: lk.pad_input(X[0], torch.arange(3).int(), 2, 3), TypeError, "torch.int32"),
    "descending": (
        lambda: lk.pad_input(X[0], torch.tensor([2, 1, 0]), 2, 3),
        RuntimeError,
        "ascend from 0 to 5, got 1",
    ),
    "outside": (
        lambda: lk.pad_input(X[0], torch.tensor([0, 1, 6]), 2, 3),
        RuntimeError,
        "ascend from 0 to 5, got 6",
    ),
    "batch": (lambda: lk.pad_input(X[0], torch.arange(3), -1, 3), ValueError, "-1 and 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()
