"""What patterns find in forwards, what they leave alone, and that both compute the same."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import handwritten_models as models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import llmos_kernels as lk
from llmos_kernels._core.numerics import Wide
from llmos_kernels.swap.calls import ModuleCall
from llmos_kernels.swap.plans import arguments_of, plan_of
from llmos_kernels.swap.proof import Replicas, judge
from llmos_kernels.swap.rules.handwritten import fused_forward

pytestmark = pytest.mark.usefixtures("one_thread")


def plan(module, *args):
    """Return the plan for a call of ``module``."""
    fused_forward.cache_clear()
    return plan_of({}, module, type(module), arguments_of(type(module), args, {}))


def check(module, *args, extent="all"):
    """Check values and gradients of the drop-in, and that its plan is the one that runs."""
    for m in module.modules():
        if hasattr(m, "p") and isinstance(m.p, float):
            m.p = 0.0
    replicas = Replicas.of(module, fused_forward(type(module)))
    assert judge(replicas, ModuleCall(args), extent=extent) <= 1
    plans = [p for ps in type(replicas.ours)._plans.values() for p in ps]
    assert plans and all(p.run is not None for p in plans)


def mask_of(length=9):
    """Return a mask to be added, which hides some keys, and none from every query."""
    mask = torch.zeros(2, 1, 1, length)
    mask[0, ..., 5:] = torch.finfo(torch.float32).min
    return mask


@pytest.mark.parametrize("cls", models.FOUND, ids=lambda cls: cls.__name__)
def test_attention_is_found(cls):
    torch.manual_seed(0)
    module, args = cls(), (torch.randn(2, 9, 32), mask_of())
    found = plan(module, *args).found
    assert len(found) == 1 and found[0].startswith("attention: softmax at handwritten_models.py:")
    check(module, *args)


class Called(TorchFunctionMode):
    """Records the names of the functions of torch that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", (*models.SHARED, models.tiled_heads), ids=lambda c: c.__name__)
def test_heads_are_repeated_only_where_kernels_cannot_share_them(cls):
    module, args = cls(), (torch.randn(2, 9, 32), mask_of())
    fused = Replicas.of(module, fused_forward(cls)).ours
    fused(*args)  # The first call is traced.
    with Called() as called:
        fused(*args)
    repeats = called.names & {"repeat_interleave", "expand"}
    assert bool(repeats) == (cls is models.tiled_heads)


@pytest.mark.parametrize("cls", models.STAYS, ids=lambda cls: cls.__name__)
def test_what_only_looks_like_attention_stays(cls):
    found = plan(cls(), torch.randn(2, 9, 32), mask_of())
    assert not found.found and found.run is None


def test_a_write_after_attention_is_no_hindrance():
    module, args = models.writes_to_value(), (torch.randn(2, 9, 32),)
    assert plan(module, *args).found
    check(module, *args, extent="inference")


@models.attention
def by_torch(self, q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)


@models.attention
def causal_by_torch(self, q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1)


@pytest.mark.parametrize("cls", [by_torch, causal_by_torch], ids=lambda cls: cls.__name__)
def test_attention_of_torch_is_found(cls):
    torch.manual_seed(0)
    module, args = cls(), (torch.randn(2, 9, 32), mask_of())
    (found,) = plan(module, *args).found
    assert found.startswith("attention: scaled_dot_product_attention at test_patterns.py:")
    check(module, *args)


def forward(function, **parts):
    """Return a module with ``parts`` whose forward is ``function``."""
    module = type(function.__name__, (nn.Module,), {"forward": function})()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def layers(*widths):
    pairs = enumerate(itertools.pairwise(widths), start=1)
    return {f"linear{i}": nn.Linear(*pair) for i, pair in pairs}


def relu_inline(self, x):
    return self.linear2(F.relu(self.linear1(x)))


def gelu_with_dropout(self, x):
    return self.linear2(self.drop(F.gelu(self.linear1(x), approximate="tanh")))


def functions_only(self, x):
    hidden = F.silu(F.linear(x, self.linear1.weight, self.linear1.bias))
    return F.linear(hidden, self.linear2.weight)


def one_layer(self, x):
    return torch.relu(self.linear1(x)) + 1


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (relu_inline, "feed-forward: relu"),
        (gelu_with_dropout, "feed-forward: gelu_tanh"),
        (functions_only, "feed-forward: silu"),
        (one_layer, "linear layer with activation: relu"),
    ],
)
def test_feed_forward_is_found(function, shown):
    torch.manual_seed(3)
    module, x = forward(function, **layers(8, 24, 8), drop=nn.Dropout()), torch.randn(2, 3, 8)
    (found,) = plan(module, x).found
    assert found.startswith(f"{shown} at test_patterns.py:")
    check(module, x, extent="outputs")


def uses_hidden(self, x):
    hidden = F.relu(self.linear1(x))
    return self.linear2(hidden) + hidden.sum()


def two_activations(self, x):
    return self.linear2(F.relu(torch.tanh(self.linear1(x))))


@pytest.mark.parametrize("function", [uses_hidden, two_activations])
def test_a_hidden_layer_that_others_use_stays(function):
    module = forward(function, **layers(8, 24, 8))
    assert not any("feed-forward" in f for f in plan(module, torch.randn(2, 8)).found)


def post_norm(self, x, y):
    return self.norm(self.drop(x) + y)


def pre_norm(self, x, y):
    h = x + self.drop(y)
    return h * 2 + self.norm(h)


def functional_norm(self, x, y):
    return F.layer_norm(x.add(y), (8,), self.norm.weight, None, 1e-3)


@pytest.mark.parametrize("function", [post_norm, pre_norm, functional_norm])
def test_a_norm_of_a_sum_is_found(function):
    torch.manual_seed(1)
    module = forward(function, norm=nn.LayerNorm(8), drop=nn.Dropout())
    args = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    (found,) = plan(module, *args).found
    assert "add and layer norm at test_patterns.py:" in found
    check(module, *args)


def subtracts(self, x, y):
    return self.norm(x - y)


def adds_twice(self, x, y):
    return self.norm(torch.add(x, y, alpha=2))


@pytest.mark.parametrize("function", [subtracts, adds_twice])
def test_a_norm_of_something_else_stays(function):
    module = forward(function, norm=nn.LayerNorm(8))
    assert not plan(module, torch.randn(2, 8), torch.randn(2, 8)).found


def test_a_residual_that_broadcasts_runs_the_stock_nodes():
    module = forward(post_norm, norm=nn.LayerNorm(8), drop=nn.Dropout(0.0))
    x, y = torch.randn(2, 3, 8), torch.randn(8)
    run = plan(module, x, y).run
    assert torch.equal(run(module, x, y), module(x, y))


def test_rows_without_keys_are_zero():
    module = models.Attention(p=0.0)
    x, mask = torch.randn(1, 4, 32), torch.zeros(1, 1, 1, 4)
    out = plan(module, x, x, x, mask).run(module, x, x, x, mask)
    assert torch.equal(out, module.to_out.bias.expand(1, 4, 32))


def test_five_lengths_share_one_plan():
    module, plans = models.CausalBlock().eval(), {}
    for length in (1, 2, 7, 33, 64):
        x = torch.randn(2, length, 32)
        found = plan_of(plans, module, type(module), arguments_of(type(module), (x,), {}))
        torch.testing.assert_close(found.run(module, x), module(x))
    assert [len(p) for p in plans.values()] == [1]


def test_weights_that_are_returned_are_computed_when_used():
    module, args = models.returns_weights(), (torch.randn(2, 9, 32), mask_of())
    run = plan(module, *args).run
    weights = run(module, *args)[1]
    assert weights._value is None and weights.shape == (2, 4, 9, 9)
    assert weights._value is None and isinstance(weights, torch.Tensor)
    torch.testing.assert_close(weights + 0, module(*args)[1])
    (weights.sum() + 1).backward()
    assert module.q.weight.grad is not None
    again = run(module, *args)[1]
    args[1].add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        again.sum()


@pytest.mark.parametrize("cls", models.LAYER_NORMS + models.RMS_NORMS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_found(cls, dtype):
    torch.manual_seed(0)
    module, x = cls().to(dtype), torch.randn(2, 9, 32, dtype=dtype)
    (found,) = plan(module, x).found
    kind = "layer norm" if cls in models.LAYER_NORMS else "RMS norm"
    assert found.startswith(f"{kind}: ") and " at handwritten_models.py:" in found
    check(module, x)


@pytest.mark.parametrize("cls", models.NO_NORMS, ids=lambda cls: cls.__name__)
def test_what_only_looks_like_a_norm_stays(cls):
    found = plan(cls(), torch.randn(2, 9, 32))
    assert not found.found and found.run is None


def test_a_norm_whose_dtype_would_change_stays_stock():
    """A weight in float32 makes the result float32; the fused norm would keep bfloat16."""
    module = models.root_mean_square()
    x = torch.randn(2, 9, 32, dtype=torch.bfloat16)
    fused = copy.deepcopy(module)
    fused.__class__ = fused_forward(type(module))
    assert plan(module, x).found
    torch.testing.assert_close(fused(x), module(x), rtol=0, atol=0)


@models.norm
def in_float32(self, x):
    """Computes in float32 whatever the input: a copy in float64 is exact only in ``Wide``."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    return (wide * (1.0 + self.weight.float())).type_as(x)


def test_the_reference_of_a_proof_is_exact():
    torch.manual_seed(0)
    x = 100 * torch.randn(3, 4, 32, dtype=torch.float64)
    module = in_float32().double()
    right = F.rms_norm(x, (32,), 1 + module.weight, module.eps)
    with Wide():
        assert module(x).dtype == torch.float64
        assert (module(x) - right).abs().max() < 1e-13
        assert x.softmax(-1, dtype=torch.float32).dtype == torch.float64
        assert F.softmax(x, -1, dtype=torch.bfloat16).dtype == torch.float64
        assert x.to(torch.float16) is not None and x.to("cpu", torch.float32).dtype == x.dtype
        lowest = torch.finfo(torch.float64).min
        assert torch.full((), lowest).dtype == torch.float64
        assert torch.full(size=(), fill_value=lowest).dtype == torch.float64
        assert torch.full((2,), 1.0, dtype=torch.float32).dtype == torch.float32
        assert x.float().to(torch.int64).dtype == torch.int64
    assert (module(x) - right).abs().max() > 1e-8
    check(in_float32(), torch.randn(3, 4, 32))


def test_compilers_see_torchs_own_functions():
    """They keep what ``torch.tensor`` is when they are imported, which may be while we trace."""
    code = """
import torch, public_structures, llmos_kernels
model, args = public_structures.nano_gpt()
llmos_kernels.optimize(model, inputs=args, verify=False)
compiled = torch.compile(lambda x: x * torch.tensor(2.0), backend="eager", fullgraph=True)
compiled(torch.ones(2))
"""
    path = os.pathsep.join([str(Path(models.__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True)


class PlusOne(nn.LayerNorm):
    """Has its weight around 0."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Printed(nn.LayerNorm):
    def forward(self, x):
        print(x.shape)
        return super().forward(x)


@pytest.mark.parametrize("cls", [PlusOne, Doubled])
def test_a_subclass_of_a_norm_is_swapped_by_what_it_computes(cls):
    torch.manual_seed(0)
    model = nn.Sequential(cls(32))
    stock, x = copy.deepcopy(model), torch.randn(3, 32)
    report = lk.optimize(model, inputs=(x,), always=True)
    assert [s.partition(" in ")[0] for s in report.sites()] == ["layer norm"]
    torch.testing.assert_close(model(x), stock(x))
    assert isinstance(model[0], cls) and type(lk.restore(model) or model[0]) is cls


def test_a_subclass_with_another_effect_is_kept_as_a_subclass():
    report = lk.optimize(nn.Sequential(Printed(32)), always=True)
    (entry,) = report.kept
    assert entry.reason == "Printed is a subclass of LayerNorm and may compute something else"


@pytest.mark.parametrize("how", ["retain_grad", "register_hook"])
def test_returned_weights_say_that_no_gradient_passes_through_them(how):
    ours = Replicas.of(models.returns_weights(), fused_forward(models.returns_weights)).ours
    _, weights = ours(torch.randn(2, 9, 32), mask_of())
    with pytest.raises(RuntimeError, match=f"{how} of attention weights.*restore"):
        getattr(weights, how)(*[lambda g: g] * (how == "register_hook"))


def test_returned_weights_in_inference_mode_are_of_the_call():
    class Direct(nn.Module):
        def forward(self, x):
            weights = (x @ x.mT).softmax(-1)
            return weights @ x, weights

    ours = Replicas.of(Direct(), fused_forward(Direct)).ours
    with torch.inference_mode():
        x = torch.randn(2, 9, 32)
        expected = Direct()(x)[1]
        _, weights = ours(x)
        x.zero_()
        torch.testing.assert_close(weights.clone(), expected)
