"""``optimize`` on forwards that are written by hand: what is fused, and what is as before."""

import copy
import inspect
import pickle

import handwritten_models as models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmos_kernels as lk
from llmos_kernels.swap.rules.handwritten import FusedForward

pytestmark = pytest.mark.usefixtures("untimed")


def case(name):
    """Return a model and arguments for it."""
    torch.manual_seed(0)
    x, mask = torch.randn(2, 9, 32), torch.ones(2, 1, 1, 9)
    mask[0, ..., 5:] = 0
    if name == "encoder":
        return models.Encoder().eval(), (x, mask)
    return nn.Sequential(models.CausalBlock(), models.CausalBlock()).eval(), (x,)


CASES = pytest.mark.parametrize("name", ["encoder", "causal"])


@CASES
@pytest.mark.parametrize("with_inputs", [False, True])
def test_every_site_is_fused(name, with_inputs):
    model, args = case(name)
    stock = copy.deepcopy(model)
    report = lk.optimize(model, inputs=args if with_inputs else None, always=True)
    assert not report.kept and max(e.error for e in report.swapped) <= 1
    sites = [s.partition(" in ")[0] for s in report.sites()]
    kinds = ["attention", "feed-forward", "dropout, add and layer norm"]
    assert sorted(set(sites)) == sorted(kinds)
    assert len(sites) == (8 if name == "encoder" else 6)
    with torch.no_grad():
        torch.testing.assert_close(model(*args), stock(*args))


def test_the_report_names_each_site():
    model, args = case("encoder")
    report = lk.optimize(model, inputs=args, always=True)
    line = next(i for i, s in enumerate(inspect.getsource(models).splitlines(), 1) if "F.soft" in s)
    expected = f"attention in layers.0.attention: softmax at handwritten_models.py:{line}"
    assert expected in report.sites() and expected in report.details()


@CASES
def test_gradients_in_train_mode(name):
    model, args = case(name)

    def fuse(model):
        report = lk.optimize(model, inputs=args, always=True)
        assert report.sites()
        return model

    models.check_gradients(model, fuse, args)


def test_a_swapped_module_is_as_before_in_all_else():
    model, (x, mask) = case("encoder")
    keys, signature = list(model.state_dict()), inspect.signature(models.Attention.forward)
    lk.optimize(model, inputs=(x, mask), always=True)
    layer = model.layers[0]
    assert isinstance(layer.attention, models.Attention) and isinstance(layer, FusedForward)
    assert list(model.state_dict()) == keys
    assert inspect.signature(type(layer.attention).forward) == signature
    expected = model(x, mask)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made.layers[0].attention) is type(layer.attention)
        assert torch.equal(made(x, mask), expected)
    lk.restore(model)
    assert type(layer.attention) is models.Attention and type(layer) is models.Layer
    torch.testing.assert_close(model(x, mask), expected)


def test_hooks_on_children_run():
    model, args = case("encoder")
    lk.optimize(model, inputs=args, always=True)
    attention = model.layers[0].attention
    for part in (attention.to_q, attention.drop, model.layers[0].norm1):
        seen = []
        handle = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        model(*args)
        handle.remove()
        assert seen == [1]


def test_other_arguments_are_traced_when_they_come():
    model, (x, mask) = case("encoder")
    stock = copy.deepcopy(model)
    lk.optimize(model, inputs=(x,), always=True)
    for args in ((x, mask), (x, mask.bool()), (x, mask.expand(2, 1, 9, 9)), (x[0][None],)):
        torch.testing.assert_close(model(*args), stock(*args))


def test_an_attribute_that_changed_is_read_again():
    model, (x, mask) = case("encoder")
    stock = copy.deepcopy(model)
    lk.optimize(model, inputs=(x, mask), always=True)
    for m in (model, stock):
        m.layers[1].attention.head_dim = 16
        m.layers[1].attention.heads = 2
    with torch.no_grad():
        torch.testing.assert_close(model(x, mask), stock(x, mask))
    model.layers[1].attention.heads = 3
    with pytest.raises(RuntimeError, match="must match"):
        model(x, mask)


def test_a_part_that_was_replaced_is_called():
    model, args = case("causal")
    lk.optimize(model, inputs=args, always=True)
    lk.restore(model[0].norm2)
    model[0].norm2 = nn.Identity()
    stock = copy.deepcopy(model)
    lk.restore(stock)
    torch.testing.assert_close(model(*args), stock(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, (x, mask) = case("encoder")
    lk.optimize(model, inputs=(x, mask), always=True)
    exact = copy.deepcopy(model).double()
    lk.restore(exact)
    out = model.to(dtype)(x.to(dtype), mask)
    tolerance = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out.double(), exact(x.double(), mask), **tolerance)


def test_autocast():
    model, args = case("causal")
    stock = copy.deepcopy(model)
    lk.optimize(model, inputs=args, always=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(*args), stock(*args)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.05, atol=0.1)


def test_torch_func_runs_the_stock_nodes():
    model, (x,) = case("causal")
    stock = copy.deepcopy(model)
    lk.optimize(model, inputs=(x,), always=True)
    ours, theirs = (torch.func.vmap(m)(x[:, None]) for m in (model, stock))
    torch.testing.assert_close(ours, theirs)


class Base(nn.Module):
    """Attention of one head, with something else that each subclass does."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.seen, self.calls = [], 0

    def attend(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return F.softmax(q @ k.mT / 5, -1) @ v


class SetsAttribute(Base):
    def forward(self, x):
        self.calls = self.calls + 1
        return self.attend(x)


class KeepsWeights(Base):
    """Keeps its weights to be looked at, and how they were asked for."""

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        self.weights = F.softmax(q @ k.mT / 5, -1)
        self.last = self.weights @ v
        return self.last


class CountsBeside(Base):
    def forward(self, x):
        self.last, self.calls = self.attend(x), self.calls + 1
        return self.last


class Appends(Base):
    def forward(self, x):
        self.seen.append(1)
        return self.attend(x)


class Prints(Base):
    def forward(self, x):
        print("attention")
        return self.attend(x)


class BranchesOnValues(Base):
    def forward(self, x):
        return self.attend(x) if x.sum() > 0 else x


class BranchesOnLength(Base):
    def forward(self, x):
        return self.attend(x) if x.shape[1] > 4 else x


class BranchesLate(Base):
    def forward(self, x):
        x = self.attend(x)
        x += 1
        return x if x.shape[1] > 4 else 2 * x


class WithoutGradients(Base):
    def forward(self, x):
        with torch.no_grad():
            return self.attend(x)


class Draws(Base):
    def forward(self, x):
        return self.attend(x) + torch.rand(32)


class CallsThroughAFunction(Base):
    """The function has a part from where it was defined, as in minGPT."""

    def __init__(self):
        super().__init__()
        value = self.v
        self.project = lambda x: value(x)

    def forward(self, x):
        return F.softmax(self.q(x) @ self.k(x).mT / 5, -1) @ self.project(x)


class AddsToList(Base):
    def forward(self, x):
        seen = self.seen
        seen += [1]
        return self.attend(x)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (SetsAttribute, "its forward sets an attribute (calls)"),
        (CountsBeside, "its forward sets an attribute (calls)"),
        (Appends, "its forward calls append"),
        (BranchesOnValues, "its forward branches on a value of its input"),
        (BranchesLate, "its forward branches on a size after it changed something"),
        (WithoutGradients, "its forward changes whether gradients are recorded"),
        (Draws, "its forward calls rand"),
        (AddsToList, "its forward changes a value in place (+=)"),
        (CallsThroughAFunction, "its forward uses a parameter other than as an attribute"),
    ],
)
def test_a_forward_with_effects_is_kept(cls, why):
    model = cls().eval()
    report = lk.optimize(nn.Sequential(model), inputs=(torch.randn(2, 9, 32),), always=True)
    entry = next(e for e in report.entries if e.cls == cls.__name__)
    assert not entry.swapped and entry.reason == why
    assert type(model) is cls


def test_an_attribute_that_is_set_to_a_tensor_is_set_again():
    model = KeepsWeights().eval()
    stock, x = copy.deepcopy(model), torch.randn(2, 9, 32)
    report = lk.optimize(model, inputs=(x,), always=True)
    assert [s.partition(":")[0] for s in report.sites()] == ["attention in the model"]
    for _ in range(2):
        x = torch.randn(3, 7, 32)
        with torch.no_grad():
            assert model(x) is model.last
            torch.testing.assert_close(model.last, stock(x))
        torch.testing.assert_close(model.weights * 1.0, stock.weights)
        assert copy.deepcopy(model).weights.shape == (3, 7, 7)
    assert "weights" not in model.state_dict()


def test_a_branch_on_a_size_is_checked_at_each_call():
    model, x = BranchesOnLength().eval(), torch.randn(2, 9, 32)
    stock = copy.deepcopy(model)
    assert lk.optimize(model, inputs=(x,), always=True).sites()
    for length in (9, 3, 5, 2):
        torch.testing.assert_close(model(x[:, :length]), stock(x[:, :length]))
    assert model(x[:, :3]).data_ptr() == x.data_ptr()
    (plans,) = type(model)._plans.values()
    assert [bool(p.found) for p in plans] == [True, False]


class WritesToInput(Base):
    def forward(self, x):
        x += 1
        x.mul_(2)
        return self.attend(x)


def test_a_write_to_the_input_stays():
    model, x = WritesToInput().eval(), torch.randn(2, 9, 32)
    stock, ours, theirs = copy.deepcopy(model), x.clone(), x.clone()
    lk.optimize(model, verify=False, inputs=(x,))
    assert isinstance(model, FusedForward)
    with torch.no_grad():
        torch.testing.assert_close(model(ours), stock(theirs))
    assert torch.equal(ours, theirs) and not torch.equal(ours, x)


def test_a_forward_that_prints_is_not_traced(capsys):
    model = Prints().eval()
    lk.optimize(model, always=True)
    assert type(model) is Prints and not capsys.readouterr().out


class MaybeCounts(Base):
    """Has an effect in a branch that is not taken in eval mode."""

    def forward(self, x):
        if self.training:
            self.calls = self.calls + 1
        return self.attend(x)


def test_an_effect_in_train_mode_alone_stays():
    model, x = MaybeCounts().eval(), torch.randn(2, 9, 32)
    stock = copy.deepcopy(model)
    lk.optimize(model, inputs=(x,), always=True)
    torch.testing.assert_close(model(x), stock(x))
    model.train()(x)
    model(x)
    assert model.calls == 2


class Configured(Base):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x):
        return self.attend(x) if self.config.attends else x


class Config:
    attends = True


def test_a_configuration_that_changed_is_read_again():
    config, x = Config(), torch.randn(2, 9, 32)
    model = Configured(config).eval()
    report = lk.optimize(model, inputs=(x,), always=True)
    assert report.sites()
    config.attends = False
    assert model(x) is x
    config.attends = True
    assert model(x) is not x


def test_modules_of_one_class_with_other_attributes():
    model = nn.Sequential(models.CausalBlock(heads=4), models.CausalBlock(heads=2)).eval()
    x, stock = torch.randn(2, 9, 32), copy.deepcopy(model)
    lk.optimize(model, inputs=(x,), always=True)
    torch.testing.assert_close(model(x), stock(x))


def test_sites_that_no_kernel_takes_are_not_reported():
    class Wide(nn.Module):
        def forward(self, q):  # Kernels have heads of at most 256.
            return (q @ q.mT).softmax(-1) @ q

    model = Wide()
    report = lk.optimize(model, inputs=(torch.randn(1, 2, 5, 300),), always=True)
    (entry,) = report.kept
    assert entry.reason.startswith("no kernel takes these inputs: attention: softmax at test_hand")
    report = lk.optimize(model, inputs=(torch.randn(1, 2, 5, 32),), always=True)
    assert len(report.sites()) == 1
