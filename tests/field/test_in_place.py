"""What may be changed in place before the backward with torch's modules may be with ours.

Such as ``x += attention(x, x, x)[0]`` in a residual block.
"""

import copy

import pytest
import torch
from torch import nn

import llmos_kernels as lk

D = 16
MODELS = {
    "attention": lambda **options: nn.MultiheadAttention(D, 2, **options),
    "attention, other widths": lambda **options: nn.MultiheadAttention(
        D, 2, kdim=D, vdim=D, **options
    ),
    "attention, bias_kv": lambda **options: nn.MultiheadAttention(
        D, 2, add_bias_kv=True, **options
    ),
    "encoder layer": lambda **options: nn.TransformerEncoderLayer(D, 2, 32, 0.0, **options),
    "pre-norm encoder layer": lambda **options: nn.TransformerEncoderLayer(
        D, 2, 32, 0.0, norm_first=True, **options
    ),
    "linear": lambda batch_first: nn.Linear(D, D),
    "feed-forward": lambda batch_first: nn.Sequential(
        nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)
    ),
    "activation": lambda batch_first: nn.Sequential(nn.Linear(D, D), nn.SiLU()),
    "norm": lambda batch_first: nn.LayerNorm(D),
}


def run(model, *given, **options):
    if not isinstance(model, nn.MultiheadAttention):
        return model(given[0])
    return model(*given, **options)[0]


def add_to_input(model, x):
    x += run(model, x, x, x)
    return x


def add_to_input_without_weights(model, x):
    x += run(model, x, x, x, need_weights=False)
    return x


def add_to_query(model, x):
    memory = x * 2
    x += run(model, x, memory, memory)
    return x


def change_memory(model, x):
    key, value = x * 2, x * 3
    y = run(model, x, key, value)
    key += 1
    value += 1
    return x + y + key + value


def change_output(model, x):
    y = run(model, x, x, x)
    y *= 2
    return y


def gradients(model, use, x):
    x = x.clone().requires_grad_()
    y = use(model, x * 1.0)
    wanted = [x, *model.parameters()]
    return [y, *torch.autograd.grad(y.sin().sum(), wanted, allow_unused=True)]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "use",
    [add_to_input, add_to_input_without_weights, add_to_query, change_memory, change_output],
)
@pytest.mark.parametrize("name", MODELS)
def test_in_place(name, use, batch_first):
    torch.manual_seed(0)
    stock = MODELS[name](batch_first=batch_first)
    model = copy.deepcopy(stock)
    assert lk.optimize(model, verify=False).swapped
    for x in (torch.randn(3, 5, D), torch.randn(3, 5, 2 * D)[..., ::2], torch.randn(1, 5, D)):
        try:
            expected = gradients(stock, use, x)
        except RuntimeError as e:
            assert "modified by an inplace operation" in str(e)
            continue
        found = gradients(model, use, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
