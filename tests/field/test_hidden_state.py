"""State that a forward changes under another name, or by a tensor, is neither lost nor touched.

And what a forward decides by may change after the swap: a cast, an entry of a dict, a global.
"""

import copy

import pytest
import torch
from field_parts import D, FeedForward, Norm
from torch import nn

import llmos_kernels as lk

pytestmark = pytest.mark.usefixtures("untimed")

TENSORS = ("count", "amax")


def made(base, code):
    """Return a module whose forward runs ``code`` before the body."""
    lines = "".join(f"    {line}\n" for line in code.split("; "))
    scope = {"torch": torch, "nn": nn, "FLAG": False}
    exec(f"def forward(self, x):\n{lines}    return self.body(x)\n", scope)
    module = type("Hidden", (base,), {"forward": scope["forward"]})()
    vars(module).update(
        seen=[], cfg={"clip": False}, count=torch.zeros(1), amax=torch.zeros(()), i=0, flag=False
    )
    return module, scope


def state(module):
    return [module.seen, module.cfg, *(getattr(module, name).tolist() for name in TENSORS)]


EFFECTS = (
    "seen = self.seen; seen += [1]",
    "cfg = self.cfg; cfg |= {'n': len(x)}",
    "getattr(self.seen, 'append')(1)",
    "self.count.add_(1)",
    "count = self.count; count += 1",
    "torch.add(self.count, 1, out=self.count)",
    "self.amax.copy_(x.abs().max())",
    "self.zero_grad()",
    "self.train(False)",
    "x = x + 0 * torch.rand(1)",
)


@pytest.mark.parametrize("base", [FeedForward, Norm])
@pytest.mark.parametrize("code", EFFECTS)
def test_effects(base, code):
    torch.manual_seed(0)
    stock, _ = made(base, code)
    model = copy.deepcopy(stock)
    before = state(model)
    lk.optimize(model, always=True)
    assert state(model) == before, "optimize ran the forward on the state of the model"
    assert type(model).__name__ == "Hidden"
    x = torch.randn(3, D)
    for _ in range(2):
        torch.testing.assert_close(model(x), stock(x))
    assert state(model) == state(stock) and model.training == stock.training


def test_a_probe_changes_no_state():
    """Also where the forward is not looked at first, as with ``inputs`` of a part."""
    module, _ = made(FeedForward, "self.seen.append(len(x)); self.count.add_(1)")
    model = nn.Sequential(module, nn.LayerNorm(D))
    lk.optimize(model, always=True, verify=False)
    assert not module.seen and not module.count.any()


#: A condition under which the input is doubled, and what makes it true after the swap.
CHANGES = {
    "x.dtype == torch.float16": lambda m, scope: m.half(),
    "self.cfg['clip']": lambda m, scope: m.cfg.update(clip=True),
    "not next(iter(self.parameters())).requires_grad": lambda m, scope: m.requires_grad_(False),
    "[False, True][self.i]": lambda m, scope: vars(m).update(i=1),
    "FLAG": lambda m, scope: scope.update(FLAG=True),
    "getattr(x, 'scaled', False)": None,
    "isinstance(x, nn.Parameter)": None,
    "x.device.type == 'cpu'": lambda m, scope: None,
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("base", [FeedForward, Norm])
@pytest.mark.parametrize("condition", CHANGES)
def test_changes_after_the_swap(base, condition, verify):
    torch.manual_seed(0)
    model, scope = made(base, f"x = x * 2 if {condition} else x")
    stock = copy.deepcopy(model)
    lk.optimize(model, always=True, verify=verify)
    x = torch.randn(3, D)
    if CHANGES[condition] is None:
        x = nn.Parameter(x)
        x.scaled = True
    else:
        CHANGES[condition](model, scope)
        CHANGES[condition](stock, scope)
    x = x.to(next(model.parameters()).dtype) if "float16" in condition else x
    torch.testing.assert_close(model(x), stock(x), atol=2e-3, rtol=2e-3)


def test_an_epsilon_that_decides():
    model, _ = made(Norm, "x = x * 2 if self.eps > 1 else x")
    stock = copy.deepcopy(model)
    lk.optimize(model, always=True)
    model.eps = stock.eps = 2.0
    x = torch.randn(3, D)
    torch.testing.assert_close(model(x), stock(x))


@pytest.mark.parametrize("code", ["x = x.clamp(-20, 20)", "x = x[:64]", "x = x.clamp(max=1e5)"])
def test_a_norm_that_limits_its_input(code):
    model, _ = made(Norm, code)
    stock = copy.deepcopy(model)
    lk.optimize(model, always=True)
    x = torch.cat([torch.randn(100, D) * size for size in (1, 100, 1e6)])
    torch.testing.assert_close(model(x), stock(x))


@pytest.mark.parametrize("act", [nn.Hardtanh(0, 20), nn.Hardtanh(0, 1e6), nn.Hardtanh(-1e9, 1e9)])
def test_a_bounded_activation(act):
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(D, 32), act, nn.Linear(32, D))
    model = copy.deepcopy(stock)
    lk.optimize(model, always=True)
    x = torch.randn(3, D)
    for size in (1, 100, 1e8):
        torch.testing.assert_close(model(x * size), stock(x * size))


class Doubled(torch.Tensor):
    """A weight that brings its own norms."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        y = super().__torch_function__(func, types, args, kwargs or {})
        norms = nn.functional.layer_norm, nn.functional.rms_norm
        return y.as_subclass(torch.Tensor) * 2 if func in norms else y


@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_with_a_weight_of_a_subclass(cls):
    stock = cls(D)
    model = copy.deepcopy(stock)
    lk.optimize(model, always=True)
    for either in (stock, model):
        either.weight = nn.Parameter(torch.ones(D).as_subclass(Doubled), requires_grad=False)
    x = torch.randn(3, D)
    torch.testing.assert_close(model(x), stock(x))
    assert model(x).abs().mean() > 1


def test_a_scripted_model_is_kept():
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    report = lk.optimize(model)
    assert not report.swapped and all(e.reason == "torch.jit has compiled it" for e in report.kept)


def test_a_metaclass_sees_no_drop_in():
    seen = []

    class Registry(type):
        def __init__(cls, name, bases, members):
            super().__init__(name, bases, members)
            seen.append(name)

    class Registered(FeedForward, metaclass=Registry):
        def forward(self, x):
            return self.body(x)

    model = Registered()
    lk.optimize(model, always=True)
    assert seen == ["Registered"] and type(model).__name__ == "FusedRegistered"
    assert model(torch.randn(2, D)).shape == (2, D)


def test_assigning_the_weight_of_int8_attention():
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    lk.quantize(attention, always=True)
    for value in (torch.zeros(96, 32), nn.Parameter(torch.zeros(96, 32))):
        attention.in_proj.weight_int8.fill_(1)
        attention.in_proj_weight = value
        assert not attention.in_proj.weight_int8.any()
