"""``optimize`` keeps a module whose drop-in is slower."""

import copy

import pytest
import torch
from torch import nn

import llmos_kernels as lk
from llmos_kernels.swap import timing


class Clock:
    """Replace ``samples``: a call takes 1 s, plus ``cost`` for each fused LayerNorm in it."""

    def __init__(self):
        self.cost, self.noise, self.now, self.asked = 0.0, 0.0, 0.0, []

    def samples(self, fns, *args, **options):
        self.asked.append(len(fns))
        found = [[] for _ in fns]
        for i in range(9):
            for j, (fn, times) in enumerate(zip(fns, found, strict=True)):
                self.now = 1.0
                fn()
                times.append(self.now + self.noise * ((i + j) % 2))
        return found


@pytest.fixture
def clock(monkeypatch):
    clock, forward = Clock(), lk.nn.LayerNorm.forward

    def timed(self, input):
        clock.now += clock.cost
        return forward(self, input)

    monkeypatch.setattr(lk.nn.LayerNorm, "forward", timed)
    monkeypatch.setattr(timing, "samples", clock.samples)
    return clock


def two_norms():
    return nn.Sequential(nn.LayerNorm(16), nn.Tanh(), nn.LayerNorm(16)).eval()


def test_what_is_slower_is_kept(clock):
    clock.cost = 0.5
    model, x = two_norms(), torch.randn(3, 16)
    report = lk.optimize(model, inputs=(x,))
    assert [e.slower for e in report.kept] == [True, True] and not report.swapped
    assert type(model[0]) is nn.LayerNorm and "_llmos_swapped_from" not in model[0].__dict__
    (time,) = report.kept[0].timings
    assert (time.rows, time.before, time.after, time.backward) == (3, 1.0, 1.5, False)
    assert report.kept[0].speedup == pytest.approx(1 / 1.5) and report.kept[0].error <= 1
    assert report.kept[0].reason == "slower here, 3 rows: 1000 -> 1500 ms"
    assert "kept 2 LayerNorm: slower here, 3 rows: 1000 -> 1500 ms" in str(report)
    lk.optimize(model, strict=True)  # Being slower alone does not raise.


def test_noise_is_not_slower(clock):
    clock.cost, clock.noise = 0.01, 0.5
    assert len(lk.optimize(two_norms()).swapped) == 2


def test_always(clock):
    clock.cost = 0.5
    model = two_norms()
    report = lk.optimize(model, inputs=(torch.randn(3, 16),), always=True)
    assert not report.kept and type(model[0]) is lk.nn.LayerNorm
    assert report.swapped[0].speedup < 1
    (whole,) = report.model
    assert (whole.before, whole.after) == (1.0, 2.0)
    assert str(report).endswith("the model: 1000 -> 2000 ms (0.50x)")


def test_unverified_swaps_are_not_timed(clock):
    report = lk.optimize(two_norms(), verify=False, inputs=(torch.randn(3, 16),))
    assert not report.kept and "nothing was proved or timed" in str(report)
    assert "swapped, not verified" in report.details()
    assert clock.asked == []


def test_modules_of_one_kind_are_timed_once(clock):
    model = nn.Sequential(*[nn.LayerNorm(16) for _ in range(5)], nn.LayerNorm(24)).eval()
    report = lk.optimize(model)
    assert len(clock.asked) == 2 * len(timing.SIZES)
    assert all([t.rows for t in e.timings] == [1, 1024] for e in report.entries)


def test_a_model_in_train_mode_is_timed_with_its_backward(clock):
    model, x = two_norms().train(), torch.randn(2, 5, 16)
    report = lk.optimize(model, inputs=(x,))
    assert [(t.rows, t.backward) for t in report.entries[0].timings] == [(10, False), (10, True)]
    assert [t.backward for t in report.model] == [False, True]
    assert model.training and all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.requires_grad_(False)
    lk.restore(model)
    report = lk.optimize(model, inputs=(x,))
    assert len(report.entries[0].timings) == 2, "The gradient of its input remains."


def test_dropout_is_timed(monkeypatch):
    """Timing in train mode uses the model's dropout; proofs use none."""
    seen, forward = [], nn.Dropout.forward

    def watched(self, input):
        seen.append(self.p)
        return forward(self, input)

    monkeypatch.setattr(nn.Dropout, "forward", watched)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.25, batch_first=True)
    lk.optimize(layer, inputs=(torch.randn(2, 5, 16),))
    assert {0.0, 0.25} <= set(seen) and layer.dropout1.p == 0.25


class Whole(nn.Module):
    """A model whose last norm costs nothing when it runs alone, and ``cost`` in the model."""

    def __init__(self, clock, cost):
        super().__init__()
        self.clock, self.cost = clock, cost
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)])
        self.linear, self.last = nn.Linear(16, 16), nn.LayerNorm(16, elementwise_affine=False)

    def forward(self, x):
        for norm in self.norms:
            x = norm(x)
        x = self.linear(x)
        self.clock.cost = self.cost
        x = self.last(x)
        self.clock.cost = 0.0
        return x


def test_the_part_to_blame_is_found(clock):
    model, x = Whole(clock, 0.5).eval(), torch.randn(4, 16)
    expected = model(x)
    report = lk.optimize(model, inputs=(x,))
    assert {e.module for e in report.swapped} == {"norms.0", "norms.1", "linear"}
    (kept,) = report.kept
    assert kept.module == "last" and kept.slower and type(model.last) is nn.LayerNorm
    assert kept.reason == "the whole model is faster without it, 1500 -> 1000 ms"
    assert str(report).endswith("the model: 1000 -> 1000 ms (1.00x)")
    assert "_llmos_swapped_from" not in model.last.__dict__
    torch.testing.assert_close(model(x), expected)
    lk.restore(model)
    assert type(model.norms[0]) is nn.LayerNorm and type(model.linear) is nn.Linear


def test_a_report_is_true_where_the_model_fails_in_the_search(clock, monkeypatch):
    """What the search has turned off is on again, as the report says."""
    model, compare = Whole(clock, 0.5).eval(), timing.compare

    def fails(*args, **options):
        if any(count > 2 for count in clock.asked):  # The search compares more than two.
            raise RuntimeError("out of memory")
        return compare(*args, **options)

    monkeypatch.setattr(timing, "compare", fails)
    report = lk.optimize(model, inputs=(torch.randn(4, 16),))
    assert "RuntimeError: out of memory" in str(report)
    assert not report.kept and type(model.last) is lk.nn.LayerNorm


def test_inputs_that_fail(clock):
    model = two_norms().train()
    with pytest.raises(RuntimeError, match="normalized_shape"):
        lk.optimize(model, inputs=(torch.randn(3, 7),))
    assert type(model[0]) is nn.LayerNorm and model.training and model[2].training
    assert not model[0]._forward_pre_hooks


def test_a_model_that_runs_once_alone(clock):
    """An error in the second run is reported and does not stop ``optimize``."""

    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.runs = nn.LayerNorm(16), []

        def forward(self, x):
            self.runs.append(x)
            if len(self.runs) > 1:
                raise RuntimeError("once is enough")
            return self.norm(x)

    model = Once().eval()
    report = lk.optimize(model, inputs=(torch.randn(3, 16),))
    assert report.swapped and not report.model and type(model.norm) is lk.nn.LayerNorm
    assert str(report).endswith("the model could not be timed: RuntimeError: once is enough")


def test_a_cache_among_the_inputs_is_not_written_to(clock):
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)

        def forward(self, x, cache):
            cache["seen"].append(len(cache["seen"]))
            return self.norm(x)

    cache = {"seen": []}
    assert lk.optimize(Grows().eval(), inputs=(torch.randn(3, 16), cache)).model
    assert cache["seen"] == []


def test_what_a_model_writes_is_put_back(clock):
    """Buffers, counters and inputs that a model changes are restored after each run."""

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.position = nn.LayerNorm(16), 0
            self.register_buffer("cache", torch.zeros(8, 16))

        def forward(self, x):
            self.cache[self.position] = x.mul_(2)[0]
            self.position += 1
            return self.norm(x)

    model, x = Writes().eval(), torch.ones(3, 16)
    assert lk.optimize(model, inputs=(x,)).model
    assert model.position == 0 and not model.cache.any() and (x == 1).all()


def test_tied_parameters_are_timed_in_train_mode(clock):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).train()
    model[2].weight = model[0].weight
    report = lk.optimize(model, strict=True)
    assert not [e for e in report.kept if not e.slower], report.details()


def test_no_step_is_timed_where_nothing_is_trained(clock):
    model = two_norms().train().requires_grad_(False)
    assert [t.backward for t in lk.optimize(model, inputs=(torch.randn(3, 16),)).model] == [False]


def test_an_interrupt_leaves_the_model_as_it_was(clock):
    model, calls = two_norms(), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt

    model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        lk.optimize(model, inputs=(torch.randn(3, 16),))
    assert type(model[0]) is type(model[2]) is nn.LayerNorm
    assert "_llmos_swapped_from" not in model[0].__dict__


def test_a_module_is_timed_at_the_fewest_and_the_most_rows_it_gets(clock):
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)

        def forward(self, x):
            return self.norm(x), self.norm(x[:1]), self.norm(x[:2]), self.norm(torch.cat([x, x]))

    (entry,) = lk.optimize(Thrice().eval(), inputs=(torch.randn(3, 16),)).entries
    assert [t.rows for t in entry.timings] == [3, 1, 6]


@pytest.mark.filterwarnings("ignore:(enable_nested|The PyTorch API of nested)")
def test_layers_that_get_nested_tensors(clock):
    """Layers inside torch's encoder, which get nested tensors, are proved on generated inputs."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, padding = nn.TransformerEncoder(layer, 2).eval(), torch.zeros(3, 5, dtype=torch.bool)
    padding[1:, 3:] = True
    inputs = {"src": torch.randn(3, 5, 16), "src_key_padding_mask": padding}
    with torch.inference_mode():
        expected = model(**inputs)
        assert not lk.optimize(model, inputs=inputs).kept
        torch.testing.assert_close(model(**inputs), expected)


def test_inner_modules_are_decided_first(clock):
    """A layer is timed after the decisions for its submodules."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    stock = copy.deepcopy(layer)
    x = torch.randn(2, 5, 16)
    clock.cost = 0.5
    report = lk.optimize(layer, inputs=(x,))
    assert type(layer.norm1) is nn.LayerNorm and {e.cls for e in report.kept} >= {"LayerNorm"}
    torch.testing.assert_close(layer(x), stock(x))
    assert report.entries[0].cls == "TransformerEncoderLayer"
