"""A fused forward does not go past global hooks, replaced forwards, or weights with own products.

After pytorch/pytorch #128413, accelerate's ``cpu_offload`` and pytorch/ao #1103.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import llmos_kernels as lk

D = 16


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(D, D), nn.Dropout(0.0), nn.LayerNorm(D)

    def forward(self, x, residual):
        return self.norm(self.dropout(self.dense(x)) + residual)


def encoder():
    return nn.TransformerEncoderLayer(D, 2, 32, dropout=0.0, batch_first=True)


def decoder():
    return nn.TransformerDecoderLayer(D, 2, 32, dropout=0.0, batch_first=True)


MODELS = {
    "encoder": (encoder, 1),
    "decoder": (decoder, 2),
    "residual": (Residual, 2),
    "sequential": (lambda: nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)), 1),
}
each_model = pytest.mark.parametrize("name", MODELS)


def swapped(name):
    make, count = MODELS[name]
    stock = make()
    model = copy.deepcopy(stock)
    assert lk.optimize(model, always=True).swapped
    return stock, model, [torch.randn(2, 5, D) for _ in range(count)]


@each_model
@pytest.mark.parametrize(
    "register", [register_module_forward_hook, register_module_forward_pre_hook]
)
def test_global_hooks(name, register):
    stock, model, given = swapped(name)
    names = {m: n for model in (stock, model) for n, m in model.named_modules()}
    seen = []
    handle = register(lambda module, *_: seen.append(names.get(module)))
    try:
        expected = stock(*given)
        wanted, seen[:] = list(seen), []
        torch.testing.assert_close(model(*given), expected)
        assert sorted(map(str, seen)) == sorted(map(str, wanted))
    finally:
        handle.remove()


@each_model
def test_replaced_forwards(name):
    stock, model, given = swapped(name)
    for part in [n for n, m in stock.named_modules() if n and not list(m.children())]:
        if part.endswith("out_proj"):  # torch does not call it either.
            continue
        for whole in (stock, model):
            module = whole.get_submodule(part)
            module.forward = lambda x, forward=module.forward: forward(x) * 1.5
        torch.testing.assert_close(model(*given), stock(*given), msg=part)


class Weight(torch.Tensor):
    """A weight that knows ``linear`` alone, and doubles it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs)
        x, weight, *bias = args
        return 2 * nn.functional.linear(x, weight.as_subclass(torch.Tensor), *bias)


@each_model
def test_weights_of_a_subclass(name):
    stock, model, given = swapped(name)
    for whole in (stock, model):
        for module in whole.modules():
            if isinstance(module, nn.Linear) and "NonDyn" not in type(module).__name__:
                data = module.weight.detach().as_subclass(Weight)
                module.weight = nn.Parameter(data, requires_grad=False)
    torch.testing.assert_close(model(*given), stock(*given))
