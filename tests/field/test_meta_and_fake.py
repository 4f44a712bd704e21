"""Every module runs on the meta device and with fake tensors, masks and padding included."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import llmos_kernels as lk

D, LENGTH = 16, 7


def encoder():
    layer = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def padding(x):
    return torch.zeros(x.shape[0], LENGTH, dtype=torch.bool, device=x.device)


CALLS = {
    "encoder": (encoder, lambda m, x: m(x)),
    "encoder, padding": (encoder, lambda m, x: m(x, src_key_padding_mask=padding(x))),
    "layer, mask": (
        lambda: nn.TransformerEncoderLayer(D, 2, 32, batch_first=True),
        lambda m, x: m(x, src_mask=torch.zeros(LENGTH, LENGTH, device=x.device)),
    ),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(D, 2, 32, batch_first=True),
        lambda m, x: m(x, x, tgt_key_padding_mask=padding(x), memory_key_padding_mask=padding(x)),
    ),
    "attention": (
        lambda: nn.MultiheadAttention(D, 2, batch_first=True),
        lambda m, x: m(x, x, x, key_padding_mask=padding(x).float())[0],
    ),
    "linear": (lambda: nn.Linear(D, D), lambda m, x: m(x)),
    "layer_norm": (lambda: nn.LayerNorm(D), lambda m, x: m(x)),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)),
        lambda m, x: m(x),
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_shapes(name, quantize, training):
    make, call = CALLS[name]
    model = make()
    lk.optimize(model, verify=False)
    if quantize:
        lk.quantize(model, always=True)
    model.train(training)
    expected = call(model, torch.randn(2, LENGTH, D)).shape
    on_meta = copy.deepcopy(model).to("meta")
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert call(on_meta, torch.empty(2, LENGTH, D, device="meta")).shape == expected
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            with mode:
                made = call(model, mode.from_tensor(torch.randn(2, LENGTH, D)))
            assert made.shape == expected
