"""Nested tensors of both layouts go through every module that takes a tensor, hooks or not."""

import copy

import pytest
import torch
from torch import nn

import llmos_kernels as lk

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
D = 16
LENGTHS = (3, 7, 5)


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), 1e-6

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


MODULES = {
    "Linear": lambda: nn.Linear(D, 600),  # Ours computes it from 2^18 MACs on.
    "LayerNorm": lambda: nn.LayerNorm(D),
    "sequential": lambda: nn.Sequential(nn.Linear(D, 600), nn.ReLU(), nn.Linear(600, D)),
    "gelu": lambda: nn.Sequential(nn.Linear(D, 32), nn.GELU()),
}


def nested(layout):
    parts = [torch.randn(n, D) for n in LENGTHS]
    return parts, torch.nested.nested_tensor(parts, layout=layout)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, layout):
    stock = MODULES[name]()
    model = copy.deepcopy(stock)
    lk.optimize(model, verify=False)
    parts, given = nested(layout)
    with torch.no_grad():
        for made, part in zip(model(given).unbind(), parts, strict=True):
            torch.testing.assert_close(made, stock(part))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_feed_forward(layout):
    module = lk.nn.FeedForward(D, 32, "gelu").eval()
    parts, given = nested(layout)
    with torch.no_grad():
        for made, part in zip(module(given).unbind(), parts, strict=True):
            torch.testing.assert_close(made, module(part))


PARTS = ("self_attn", "linear1", "dropout", "norm1", "norm2", "linear2", "self_attn.out_proj", "")


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_a_padded_encoder_with_a_hook(part, quantize):
    """``nn.TransformerEncoder`` makes nested tensors of padded batches in inference."""
    layer = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2).eval()
    model = copy.deepcopy(stock)
    lk.optimize(model, verify=False)
    if quantize:
        lk.quantize(model, always=True)
    x = torch.randn(3, 9, D)
    padding = torch.arange(9) >= torch.tensor([[9], [4], [6]])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        seen = []
        module = model.layers[0].get_submodule(part)
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        found = model(x, src_key_padding_mask=padding)
        handle.remove()
        torch.testing.assert_close(found[~padding], expected[~padding])
        assert seen or part == "self_attn.out_proj"  # torch does not call it either.
        if not quantize:
            torch.testing.assert_close(
                found[~padding], stock(x, src_key_padding_mask=padding)[~padding]
            )


@pytest.mark.parametrize("parts", [[], [(0,)], [(0,), (3,)]], ids=str)
def test_sequences_of_nothing(parts):
    """A nested tensor without sequences is refused as by torch; one with empty ones is computed."""
    torch.manual_seed(0)
    stock = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True).eval()
    model = copy.deepcopy(stock)
    lk.optimize(model, always=True, verify=False)
    given = torch.nested.nested_tensor([torch.randn(*shape, D) for shape in parts])
    with torch.no_grad():
        if not parts:
            for module in (stock, model):
                with pytest.raises(AssertionError, match="NestedTensor"):
                    module(given)
                with pytest.raises(AssertionError, match="NestedTensor"):
                    module.self_attn(given, given, given, need_weights=False)
            return
        for made, part in zip(model(given).unbind(), given.unbind(), strict=True):
            torch.testing.assert_close(made, stock(part))
