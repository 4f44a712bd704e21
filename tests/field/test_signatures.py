"""The forward of a swapped module has the signature of the stock one.

transformers' ``Trainer`` and exporters read from it which inputs a model takes.
"""

import copy
import inspect
import pickle

import pytest
import torch
from swap_models import Block
from torch import nn

import llmos_kernels as lk

D = 16


class Feeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)

    def forward(self, hidden_states, /):
        return self.down(self.act(self.up(hidden_states)))


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), 1e-6

    def forward(self, hidden_states=None):
        x = hidden_states
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


MODELS = {
    "feed-forward": Feeds,
    "norm": Norm,
    "residual": Block,
    "sequential": lambda: nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)),
    "encoder": lambda: nn.TransformerEncoderLayer(D, 2, 32),
    "decoder": lambda: nn.TransformerDecoderLayer(D, 2, 32),
    "attention": lambda: nn.MultiheadAttention(D, 2),
    "layer_norm": lambda: nn.LayerNorm(D),
    "rms_norm": lambda: nn.RMSNorm(D),
    "linear": lambda: nn.Linear(D, D),
}


def parameters(module):
    found = inspect.signature(module.forward).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


@pytest.mark.parametrize("name", MODELS)
def test_signatures(name):
    stock = MODELS[name]()
    model = copy.deepcopy(stock)
    assert lk.optimize(model, verify=False).swapped and type(model) is not type(stock)
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert parameters(again) == parameters(stock)
        with pytest.raises(TypeError):
            again(unknown=torch.randn(3, D))
