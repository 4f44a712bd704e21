"""Feed-forward blocks, linear layers and RMS norms of classes that no rule knows by name."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmos_kernels as lk
from llmos_kernels.swap.rules.rms_norm import FusedRMSNorm, epsilon_name
from llmos_kernels.swap.rules.sequential import FusedSequential, activation_of, find_steps

pytestmark = pytest.mark.usefixtures("one_thread")


class Own(nn.Module):
    """GELU as a formula."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))


class Block(nn.Module):
    def __init__(self, activation=None, p=0.1):
        super().__init__()
        # The layers are not registered in the order of their use.
        self.narrow = nn.Linear(40, 24)
        self.act = activation or Own()
        self.drop = nn.Dropout(p)
        self.wide = nn.Linear(24, 40)
        self.last = nn.Dropout(p)

    def forward(self, states):
        return self.last(self.narrow(self.drop(self.act(self.wide(states)))))


class Chunked(Block):
    """A feed-forward block that branches on attributes and calls a method of its own."""

    chunk = 0

    def forward(self, states):
        return self.run(states) if not self.chunk else torch.cat([self.run(states)])

    def run(self, x):
        if self.wide.weight.dtype != torch.int8 and x.dtype == self.wide.weight.dtype:
            x = self.wide(x)
        return self.narrow(self.act(x))


class Adds(Block):
    def forward(self, states):
        return super().forward(states) + states


class Scales(Block):
    def forward(self, states):
        return self.narrow(self.act(self.wide(states)) * 1)


class LooksAtShapes(Block):
    def forward(self, states):
        x = self.wide(states)
        return self.narrow(self.act(x) if x.dim() == 3 else x)


class InTrainingAlone(Block):
    def forward(self, states):
        x = self.wide(states)
        return self.narrow(self.act(x) if self.training else x)


class Twice(Block):
    def forward(self, states):
        return self.narrow(self.act(self.act(self.wide(states))))


class Forks(Block):
    def forward(self, states):
        x = self.wide(states)
        self.act(x)
        return self.narrow(x)


class Peeks(Block):
    def forward(self, states):
        x = self.act(self.wide(states))
        self.seen = x.mean()
        return self.narrow(x)


class Reaches(Block):
    def forward(self, states):
        return F.linear(self.act(self.wide(states)), self.narrow.weight)


class TwoArguments(Block):
    def forward(self, states, other=None):
        return super().forward(states)


class OwnParameter(Block):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


SEQUENTIAL = {
    "block": Block,
    "relu": lambda: Block(nn.ReLU()),
    "chunked": Chunked,
    "sequential": lambda: nn.Sequential(
        nn.LayerNorm(24), nn.Linear(24, 40), nn.GELU("tanh"), nn.Linear(40, 24, bias=False)
    ),
    "three layers": lambda: nn.Sequential(
        nn.Linear(24, 16), nn.SiLU(), nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 8)
    ),
    "one layer": lambda: nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.LayerNorm(16)),
}
OTHERS = [
    Adds,
    Scales,
    LooksAtShapes,
    InTrainingAlone,
    Twice,
    Forks,
    Peeks,
    Reaches,
    TwoArguments,
    OwnParameter,
    lambda: Block(nn.LeakyReLU()),
    lambda: Block(nn.Tanh()),
    lambda: Block(nn.ReLU6()),
    lambda: nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)),
]


def spread(module):
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_sequential(name, dtype):
    module = spread(SEQUENTIAL[name]()).to(dtype)
    old, x = copy.deepcopy(module).eval(), torch.randn(2, 3, 24, dtype=dtype)
    report = lk.optimize(module, always=True)
    (entry,) = (e for e in report.entries if not e.module)
    assert entry.swapped and entry.error <= 1 and not report.kept, report
    assert isinstance(module, FusedSequential) and isinstance(module, type(old))
    module.eval()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(module(x), old(x), atol=tolerance, rtol=tolerance)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved(module)):
        assert type(again) is type(module) and torch.equal(again(x), module(x))
    lk.restore(module)
    assert type(module) is type(old) and torch.equal(module(x), old(x))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "make", OTHERS, ids=[getattr(o, "__name__", str(i)) for i, o in enumerate(OTHERS)]
)
def test_what_only_looks_like_one(make):
    module = make()
    assert not find_steps(module)[0]
    lk.optimize(module, always=True)
    assert not isinstance(module, FusedSequential)


def test_what_is_fused():
    def calls(module):
        return [len(step.children) for step in find_steps(module)[0] if step.activation]

    assert calls(Block()) == [4] and calls(Chunked()) == [3]
    assert calls(SEQUENTIAL["three layers"]()) == [2, 3] and calls(SEQUENTIAL["one layer"]()) == [2]


def test_dropout_between_and_after():
    block = spread(Block(p=0.5)).train()
    lk.optimize(block, always=True)
    x = torch.randn(64, 24)
    torch.manual_seed(1)
    y = block(x)
    assert 0.3 < (y == 0).float().mean() < 0.7
    torch.manual_seed(1)
    assert torch.equal(block(x), y) and not torch.equal(block(x), y)
    block.last.p = 0.0
    block.eval()
    whole = block(x)
    block.drop.train()
    assert not torch.equal(block(x), whole)


def test_children_that_change_after_the_swap():
    block = spread(Block()).eval()
    lk.optimize(block, always=True)
    x = torch.randn(3, 24)
    before, seen = block(x), []
    handle = block.act.register_forward_hook(lambda m, args, out: seen.append(out))
    torch.testing.assert_close(block(x), before)
    assert len(seen) == 1
    handle.remove()
    block.act = nn.Tanh()
    expected = block.narrow(torch.tanh(block.wide(x)))
    torch.testing.assert_close(block(x), expected)
    block.act, block.wide = nn.ReLU(), nn.Sequential(block.wide)
    torch.testing.assert_close(block(x), block.narrow(block.wide(x).relu()))


def test_activations_are_known_by_their_values():
    transformers = pytest.importorskip("transformers")
    act2fn = transformers.activations.ACT2FN
    names = {
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
        "silu": "silu",
        "relu2": "relu2",
        "gelu_python": "gelu",
        "quick_gelu": None,
        "tanh": None,
        "leaky_relu": None,
        "relu6": None,
        "sigmoid": None,
        "linear": None,
    }
    assert {n: activation_of(act2fn[n]) for n in names} == names
    for other in (nn.Dropout(0.0), nn.Identity(), nn.PReLU(), nn.RReLU(), nn.GLU(), nn.Softmax(-1)):
        assert activation_of(other) is None


class Centred(nn.Module):
    """A LayerNorm without bias, which looks like an RMS norm."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(24)), 1e-6

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class EpsOutside(Centred):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class PlusOne(Centred):
    def forward(self, x):
        return (1 + self.weight) * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class Root(Centred):
    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norms(dtype):
    norm, x = Root().to(dtype), torch.randn(5, 24, dtype=dtype)
    with torch.no_grad():
        norm.weight.normal_()
    before = norm(x)
    assert lk.optimize(norm, always=True).entries[0].swapped and isinstance(norm, FusedRMSNorm)
    torch.testing.assert_close(norm(x), before)
    norm.eps = 0.5
    torch.testing.assert_close(norm(x), Root.forward(norm, x))
    wide = x.double()
    assert torch.equal(norm(wide), Root.forward(norm, wide))
    assert type(pickle.loads(pickle.dumps(norm))) is type(norm)
    lk.restore(norm)
    assert type(norm) is Root
    assert not any(epsilon_name(other()) for other in (Centred, EpsOutside, PlusOne))


def test_linear_layers():
    layer, x = spread(nn.Linear(24, 16)), torch.randn(2, 3, 24)
    before = layer(x)
    assert lk.optimize(layer, always=True).entries[0].swapped and type(layer) is lk.nn.Linear
    torch.testing.assert_close(layer(x), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    lk.restore(layer)
    assert type(layer) is nn.Linear
    for dtype in (torch.bfloat16, torch.float16):
        half = spread(nn.Linear(24, 16)).to(dtype)
        assert lk.optimize(half, always=True).entries[0].swapped, "a candidate on every CPU"
        assert lk.nn.Linear.forward(half, x.to(dtype)).dtype == dtype
    # nn.MultiheadAttention never calls its out_proj.
    report = lk.optimize(nn.MultiheadAttention(8, 2), always=True)
    assert [e.module for e in report.entries] == [""]
