"""nn.TransformerEncoder and nn.TransformerDecoder that compute tokens alone."""

import copy

import pytest
import torch
from torch import nn

import llmos_kernels as lk
from llmos_kernels.nn.packed import Packed
from llmos_kernels.testing import make_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
WIDTH = 16
LENGTHS = {
    "right": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "left": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [1, 1, 0, 1, 1]],
    "nothing in a row": [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "one token": [[0, 0, 1, 0, 0]],
    "none": [[1] * 5] * 2,
}


@pytest.fixture
def packs(monkeypatch):
    """The packs that are taken."""
    found = []
    put = Packed.put
    monkeypatch.setattr(Packed, "put", lambda self, rows: found.append(self) or put(self, rows))
    return found


def hidden(name):
    return torch.tensor(LENGTHS[name]) == 0


def pair(train, batch_first, norm_first=False):
    """Return a transformer of torch in float64, and a copy that skips padding."""
    torch.manual_seed(0)
    options = {"batch_first": batch_first, "norm_first": norm_first}
    model = nn.Transformer(WIDTH, 2, 2, 2, 32, 0.0, **options).train(train)
    ours = copy.deepcopy(model)
    report = lk.optimize(ours, verify=False, skip_padding=True)
    assert [p.skipped for p in report.padding] == [True]
    return model.double(), ours.double()


def results(fn, inputs, parameters, is_token, batch_first):
    inputs = [t.double().requires_grad_() for t in inputs]
    out = fn(*inputs)
    found = (out if batch_first else out.transpose(0, 1))[is_token]
    wanted = [*inputs, *parameters]
    gradients = torch.autograd.grad(found, wanted, make_gradients([found]), allow_unused=True)
    # Padding of the inputs gets no gradient, that of stock gets one of 0.
    return [found.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("float_mask", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_encoder(name, batch_first, train, causal, float_mask, packs):
    stock, ours = (m.encoder for m in pair(train, batch_first, norm_first=causal))
    padding = hidden(name)
    src = torch.randn(*padding.shape, WIDTH)
    src = src if batch_first else src.transpose(0, 1)
    given = {"src_key_padding_mask": padding}
    if causal:
        given["mask"] = torch.ones(5, 5).triu(1).bool()
    if float_mask:
        as_float = lambda m: torch.zeros(m.shape).masked_fill(m, float("-inf")).double()
        given = {k: as_float(m) for k, m in given.items()}
    is_token = ~padding
    run = [
        results(lambda x, m=m: m(x, **given), [src], m.parameters(), is_token, batch_first)
        for m in (ours, stock)
    ]
    if name == "nothing in a row":  # There torch gives NaN, and all its gradients are NaN.
        run = [r[:1] for r in run]
    torch.testing.assert_close(*run, rtol=1e-7, atol=1e-9)
    assert bool(packs) == (name != "none")
    out = ours(src.double(), **given)
    out = out if batch_first else out.transpose(0, 1)
    assert name == "none" or not out[padding].any()


@pytest.mark.parametrize("masks", ["both", "memory", "tgt"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["right", "holes"])
def test_whole_transformer(name, batch_first, train, masks, packs):
    """Its memory is packed for cross attention."""
    stock, ours = pair(train, batch_first)
    padding, tgt_padding = hidden(name), hidden("right").flip(0)[:, :4]
    src, tgt = torch.randn(3, 5, WIDTH), torch.randn(3, 4, WIDTH)
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    given = {"tgt_mask": torch.ones(4, 4).triu(1).bool(), "tgt_is_causal": True}
    if masks != "tgt":
        given |= {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    is_token = torch.ones(3, 4, dtype=torch.bool)
    if masks != "memory":
        given["tgt_key_padding_mask"], is_token = tgt_padding, ~tgt_padding
    run = [
        results(
            lambda s, t, m=m: m(s, t, **given), [src, tgt], m.parameters(), is_token, batch_first
        )
        for m in (ours, stock)
    ]
    torch.testing.assert_close(*run, rtol=1e-7, atol=1e-9)
    decoder = packs[-1]
    assert decoder.is_whole == (masks == "memory")
    assert decoder.total == int(is_token.sum())


@pytest.mark.parametrize("verify", [False, True])
def test_memory_that_is_read_at_padding(verify, packs):
    """Without a mask of its own a decoder reads what the encoder returns at padding."""
    torch.manual_seed(0)
    stock = nn.Transformer(WIDTH, 2, 2, 2, 32, 0.0, batch_first=True).eval()
    ours = copy.deepcopy(stock)
    assert lk.optimize(ours, verify=verify, skip_padding=True).padding[0].skipped
    given = {"src_key_padding_mask": hidden("right")}
    src, tgt = torch.randn(3, 5, WIDTH), torch.randn(3, 4, WIDTH)
    packs.clear()
    torch.testing.assert_close(ours(src, tgt, **given), stock(src, tgt, **given))
    assert not packs
    given["memory_key_padding_mask"] = hidden("right")
    torch.testing.assert_close(ours(src, tgt, **given), stock(src, tgt, **given))
    assert packs


WRONG = {
    "size": {"mask": torch.ones(4, 4).triu(1).bool()},
    "hint": {"is_causal": True},
    "padding": {"src_key_padding_mask": hidden("right")[:, :4]},
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_torch(name, packs):
    stock, ours = (m.encoder.eval() for m in pair(False, True))
    src = torch.randn(3, 5, WIDTH).double()
    given = {"src_key_padding_mask": hidden("right")} | WRONG[name]
    with pytest.raises((RuntimeError, AssertionError, TypeError)):
        stock(src, **given)
    with pytest.raises((RuntimeError, AssertionError, TypeError)):
        ours(src, **given)
    assert not packs


def test_other_masks_take_the_padded_path(packs):
    stock, ours = (m.encoder.eval() for m in pair(False, True))
    padding, src = hidden("right"), torch.randn(3, 5, WIDTH).double()
    other = torch.zeros(5, 5, dtype=torch.bool)
    other[0, 2] = True
    added = torch.zeros(3, 5).double()
    added[0, 1] = -1.0
    per_head = torch.zeros(6, 5, 5, dtype=torch.bool)
    for given in (
        {"mask": other, "src_key_padding_mask": padding},
        {"src_key_padding_mask": added},
        {"mask": per_head, "src_key_padding_mask": padding},
        {"mask": torch.ones(5, 5).triu(1).bool()},
        {"mask": other, "src_key_padding_mask": padding, "is_causal": True},
    ):
        actual, expected = ours(src, **given), stock(src, **given)
        is_token = ~padding if given.get("src_key_padding_mask") is padding else padding >= 0
        torch.testing.assert_close(actual[is_token], expected[is_token])
    assert not packs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_does_not_leak(value):
    _, ours = pair(True, True)
    padding = hidden("holes")
    src = torch.randn(3, 5, WIDTH).double()
    src[padding] = value
    src.requires_grad_()
    out = ours.encoder(src, src_key_padding_mask=padding)
    out.sum().backward()
    assert out.isfinite().all() and src.grad.isfinite().all() and not src.grad[padding].any()
    assert all(p.grad.isfinite().all() for p in ours.encoder.parameters())


def test_as_modules_of_their_own():
    torch.manual_seed(0)
    stock = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    layer = lk.nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
    ours = lk.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    ours.load_state_dict(stock.state_dict())
    padding, src = hidden("right"), torch.randn(3, 5, WIDTH)
    actual, expected = (m(src, src_key_padding_mask=padding) for m in (ours, stock))
    torch.testing.assert_close(actual[~padding], expected[~padding], atol=1e-5, rtol=1e-5)


def test_kept_with_the_reason():
    class Other(nn.TransformerEncoderLayer):
        pass

    stacks = {
        "a layer is a Other, not swapped": nn.TransformerEncoder(
            Other(WIDTH, 2, 32, batch_first=True), 1
        ),
        "its norm is a Sequential": nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True), 1, nn.Sequential()
        ),
    }
    for why, stack in stacks.items():
        (padding,) = lk.optimize(stack, verify=False, skip_padding=True).padding
        assert padding.reason == why and type(stack) is nn.TransformerEncoder


def test_proof_times_and_restore():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.arange(64) >= torch.randint(1, 9, (8, 1))
    src = torch.randn(8, 64, 64)
    given = {"src": src, "src_key_padding_mask": padding}
    report = lk.optimize(model, inputs=given, always=True, skip_padding=True)
    (found,) = report.padding
    assert found.skipped and found.error <= 1 and found.timings and found.fill < 0.2
    assert type(model) is lk.nn.TransformerEncoder
    lk.restore(model)
    assert type(model) is nn.TransformerEncoder
    assert type(model.layers[0]) is nn.TransformerEncoderLayer
