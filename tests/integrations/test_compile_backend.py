"""The backend "llmos" of torch.compile: what it rewrites, what it leaves, and its options."""

import copy
from importlib import import_module
from pathlib import Path

import handwritten_models as models
import pytest
import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass

import llmos_kernels as lk
from llmos_kernels.integrations.compile import rewriting
from llmos_kernels.integrations.compile.backend import backend

pytestmark = pytest.mark.usefixtures("one_thread")
EAGER = {"then": "eager"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled(model, options=EAGER, **kwargs):
    return torch.compile(model, backend=backend, options=options, fullgraph=True, **kwargs)


def case(name):
    torch.manual_seed(0)
    x, mask = torch.randn(2, 9, 32), torch.ones(2, 1, 1, 9)
    mask[0, ..., 5:] = 0
    if name == "encoder":
        return models.Encoder().eval(), (x, mask)
    return models.CausalBlock().eval(), (x,)


CASES = pytest.mark.parametrize("name", ["encoder", "causal"])


@CASES
@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_every_site_is_rewritten(name, then):
    model, args = case(name)
    made = compiled(model, {"then": then})
    torch.testing.assert_close(made(*args), model(*args))
    (graph,) = lk.compile_report(made).graphs
    assert not graph.why_not and graph.error <= 1
    kinds = sorted({site.partition(" at ")[0].partition(":")[0] for site in graph.found})
    expected = ["attention", "dropout, add and layer norm", "feed-forward"]
    assert kinds == expected + ["layer norm"] * (name == "causal")
    assert all("handwritten_models.py:" in site for site in graph.found)
    assert "attention: softmax at handwritten_models.py:" in str(lk.compile_report(model))


@CASES
def test_gradients(name):
    model, args = case(name)
    models.check_gradients(model, lambda m: compiled(m, {"then": "aot_eager"}), args)
    assert lk.compile_report(model).graphs[0].found


def test_a_swapped_model_is_rewritten_further():
    model, args = case("encoder")
    expected = model(*args)
    lk.optimize(model.layers[0].feed_forward, verify=False)
    made = compiled(model)
    torch.testing.assert_close(made(*args), expected)
    (graph,) = lk.compile_report(made).graphs
    assert not graph.why_not and any("attention" in site for site in graph.found)


def test_one_graph_serves_five_lengths():
    model, _ = case("causal")
    made = compiled(model, dynamic=True)
    made(torch.randn(2, 9, 32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (2, 17, 33, 60):
            x = torch.randn(3, length, 32)
            torch.testing.assert_close(made(x), model(x))
    assert len(lk.compile_report(made).graphs) == 1


def test_a_wrong_rewriting_is_left(monkeypatch):
    from llmos_kernels.graph.patterns.feed_forward import FeedForwardCall

    original = FeedForwardCall.__call__
    monkeypatch.setattr(FeedForwardCall, "__call__", lambda *args: 1.001 * original(*args))
    model, args = case("causal")
    made = compiled(model)
    torch.testing.assert_close(made(*args), model(*args))
    (graph,) = lk.compile_report(made).graphs
    assert graph.why_not.startswith("it misses the error budget") and graph.error > 1


def test_what_gains_too_little_is_left(monkeypatch):
    monkeypatch.setattr(rewriting, "_speedup", lambda *_: 1.05)
    model, args = case("causal")
    made = compiled(model, {"then": "eager", "min_gain": 1.1})
    made(*args)
    (graph,) = lk.compile_report(made).graphs
    assert graph.why_not == "1.05x as fast, min_gain is 1.1"


def test_float64_and_torch_func_stay():
    model, (x,) = case("causal")
    made = compiled(copy.deepcopy(model).double())
    made(x.double())
    assert not lk.compile_report(made).graphs[0].found


def test_sharded_parameters_stay(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel

    model, x = models.FeedForward(), torch.randn(2, 9, 32)
    expected = model(x)
    plan = {"up": parallel.ColwiseParallel(), "down": parallel.RowwiseParallel()}
    parallel.parallelize_module(model, init_device_mesh("cpu", (1,)), plan)
    made = torch.compile(model, backend=backend, options=EAGER)
    torch.testing.assert_close(made(x), expected)
    assert not any(graph.found for graph in lk.compile_report(made).graphs)


@pytest.mark.parametrize(
    ("options", "error", "choices"),
    [
        ({"them": "eager"}, ValueError, "options of the backend llmos are then, prove, min_gain"),
        ({"then": "nvfuser"}, ValueError, "then must be one of inductor, aot_eager, eager"),
        ({"prove": 1}, TypeError, "prove must be a bool"),
        ({"min_gain": "much"}, TypeError, "min_gain must be a number or None"),
        ({"min_gain": float("nan")}, ValueError, "min_gain must be 0 or more and finite, got nan"),
    ],
)
def test_unknown_options_name_the_choices(options, error, choices):
    with pytest.raises(Exception, match=choices) as raised:
        compiled(nn.Linear(4, 4), options)(torch.randn(2, 4))
    causes = [raised.value, raised.value.__cause__, raised.value.__context__]
    assert any(isinstance(e, error) for e in causes)


def test_graph_breaks_are_named():
    class Breaks(models.FeedForward):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    made = torch.compile(Breaks(), backend=backend, options=EAGER)
    made(torch.randn(2, 32))
    assert "graph break, " in str(lk.compile_report(made))
    other = compiled(models.FeedForward())
    other(torch.randn(2, 32))
    assert "graph break" not in str(lk.compile_report(other))
    assert str(lk.compile_report(models.FeedForward())).startswith("nothing was compiled")


def test_the_pass_rewrites_graphs():
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    lk.compile_pass()(gm.graph)
    assert lk.compile_pass().uuid() == lk.compile_pass().uuid()
    assert isinstance(lk.compile_pass(), CustomGraphPass)  # Else inductor caches nothing.
    with pytest.raises(TypeError, match="model must be"):
        lk.compile_report(gm.graph)


def test_the_entry_point_is_the_backend():
    import sys

    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no tomllib")
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    place, _, name = project["entry-points"]["torch_dynamo_backends"]["llmos"].partition(":")
    assert getattr(import_module(place), name) is backend
