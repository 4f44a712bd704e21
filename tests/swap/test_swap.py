"""``optimize`` and ``restore``: what is swapped, equal results, and nothing else changes."""

import copy
import io
import json
import pickle

import pytest
import torch
from swap_models import Block, Model, OptionalSkip, TwiceNorm, classes
from torch import nn

import llmos_kernels as lk
from llmos_kernels import testing
from llmos_kernels.swap import calls
from llmos_kernels.swap.replica import replica

SWAPPED = {"embed", "first", "widen", "block", "block.project", "block.norm", "last"}


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(4, 5, 16)


@pytest.mark.parametrize("inputs", ["generated", "tuple", "dict"])
def test_swap_and_restore(x, inputs):
    model = Model().eval()
    before, old, ids = model(x), classes(model), {n: id(p) for n, p in model.named_parameters()}
    given = {"generated": None, "tuple": (x,), "dict": {"x": x}}[inputs]
    report = lk.optimize(model, inputs=given, always=True)
    assert {e.module for e in report.swapped} == SWAPPED
    assert not report.kept
    assert all(0 <= e.error <= 1 and e.speedup > 0 for e in report.swapped)
    assert type(model.first) is lk.nn.LayerNorm and type(model.last) is lk.nn.RMSNorm
    assert isinstance(model.block, Block) and type(model.block) is not Block
    torch.testing.assert_close(model(x), before)
    assert {n: id(p) for n, p in model.named_parameters()} == ids
    lk.restore(model)
    assert classes(model) == old and torch.equal(model(x), before)
    assert "_llmos_swapped_from" not in model.first.__dict__


def test_in_inference_mode(x):
    model = Model().eval()
    with torch.inference_mode():
        before = model(x)
        report = lk.optimize(model, inputs=(x * 1,), always=True)
        torch.testing.assert_close(model(x), before)
    assert len(report.swapped) == len(SWAPPED)


def test_gradients_and_dropout_of_the_swapped_model(x):
    model = Model(p=0.0).train()
    stock = copy.deepcopy(model)
    lk.optimize(model, always=True)
    for m in (model, stock):
        m(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    model.block.drop.p = 0.5
    torch.manual_seed(1)
    first = model(x)
    assert not torch.equal(model(x), first)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)


def test_calls_that_no_fused_op_takes(x):
    assert "block" not in {
        e.module for e in lk.optimize(Model(block=OptionalSkip), always=True).entries
    }
    stock = Block(p=0.0)
    block = copy.deepcopy(stock)
    assert lk.optimize(block, always=True).entries[0].swapped
    wide = x.repeat(1, 1, 2)
    torch.testing.assert_close(block(wide, x[:1]), stock(wide, x[:1]))
    torch.testing.assert_close(block(skip=x, states=wide), stock(wide, x))
    block.drop.p = 1.0
    assert torch.isfinite(block(wide, x)).all()
    for call in ({"states": wide}, {"states": wide, "skip": x, "bogus": 1}):
        with pytest.raises(TypeError):
            block(**call)
    with pytest.raises(TypeError):
        block(wide, x, skip=x)


def test_an_eval_with_effects_is_not_called(x):
    class Merging(nn.Linear):
        def train(self, mode=True):
            with torch.no_grad():
                self.weight.add_(0 if mode else 1)
            return super().train(mode)

    model = nn.Sequential(Merging(16, 16), nn.LayerNorm(16))
    weight = model[0].weight.clone()
    assert lk.optimize(model, inputs=(x,), always=True).swapped
    assert torch.equal(model[0].weight, weight) and model[0].training


def test_a_class_changed_after_the_swap_is_not_lost(x):
    model = nn.Sequential(nn.LayerNorm(16), nn.LayerNorm(16))
    lk.optimize(model, always=True)
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"1 became a ParametrizedLayerNorm"):
        lk.restore(model)
    assert type(model[0]) is lk.nn.LayerNorm
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    lk.restore(model)
    assert type(model[0]) is type(model[1]) is nn.LayerNorm


def test_only_the_models_generators_are_seeded(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    lk.optimize(nn.LayerNorm(8), always=True)
    assert not seeded


def test_second_optimize_is_a_no_op():
    model = Model()
    lk.optimize(model, always=True)
    old = classes(model)
    assert lk.optimize(model, always=True).entries == [] and classes(model) == old
    lk.restore(model)
    assert type(model.first) is nn.LayerNorm


def test_report():
    report = lk.optimize(nn.Sequential(nn.LayerNorm(8), TwiceNorm(8)), always=True)
    text = str(report)
    assert (
        "kept 1 TwiceNorm: TwiceNorm is a subclass" in text
        and "1 swapped, 1 kept" in text
        and "kept: TwiceNorm is a subclass" in report.details()
    )
    entries = json.loads(json.dumps(report.to_dict()))["entries"]
    assert [e["swapped"] for e in entries] == [True, False]
    nothing = str(lk.optimize(nn.Bilinear(1, 1, 1), always=True))
    assert nothing.endswith("0 swapped, 0 kept: the model is as it was")
    assert "(the model)" in lk.optimize(nn.LayerNorm(8), always=True).details()


@pytest.mark.parametrize("bad", [None, "bert", torch.ones(3)], ids=lambda v: type(v).__name__)
def test_no_module(bad):
    for fn in (lk.optimize, lk.restore):
        with pytest.raises(TypeError, match=type(bad).__name__):
            fn(bad)
    with pytest.raises(TypeError, match="list"):
        lk.optimize(nn.LayerNorm(8), inputs=[torch.ones(8)], always=True)
    with pytest.raises(TypeError, match="always must be a bool, got 'no'"):
        lk.optimize(nn.LayerNorm(8), always="no")


def test_nothing_but_classes_changes(x):
    """The proof changes no random state, mode or gradient, and runs no hook."""
    model = Model()
    model.block.drop.eval()
    calls = []
    model.first.register_forward_hook(lambda *a: calls.append("hook"))
    model.block.project.register_forward_hook(lambda *a: calls.append("inner"))
    modes, state = {n: m.training for n, m in model.named_modules()}, torch.get_rng_state()
    lk.optimize(model, always=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters()) and not calls
    model(x)
    assert calls == ["hook", "inner"]


def test_parts_replaced_after_the_swap(x):
    model = Model().eval()
    lk.optimize(model, always=True)
    model.block.norm = TwiceNorm(16)
    expected = copy.deepcopy(model)
    lk.restore(expected)
    assert torch.equal(model.block(x.repeat(1, 1, 2), x), expected.block(x.repeat(1, 1, 2), x))


def test_shared_modules(x):
    norm = nn.LayerNorm(16)
    model = nn.Sequential(norm, nn.Identity(), norm)
    report = lk.optimize(model, always=True)
    assert len(report.swapped) == 1 and model[0] is model[2] is norm
    lk.restore(model)
    assert type(norm) is nn.LayerNorm


def test_deepcopy_and_pickle(x):
    model = Model().eval()
    before = model(x)
    lk.optimize(model, always=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for again in copies:
        assert classes(again) == classes(model)
        assert torch.equal(again(x), model(x))
        lk.restore(again)
        assert torch.equal(again(x), before)
    assert type(model.first) is lk.nn.LayerNorm
    assert set(model.state_dict()) == set(Model().state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(x, dtype):
    model = Model().to(dtype).eval()
    expected = model(x.to(dtype))
    report = lk.optimize(model, inputs=(x.to(dtype),), always=True)
    assert not report.kept, report
    torch.testing.assert_close(model(x.to(dtype)), expected, atol=0.05, rtol=0.02)


def test_ddp(x, process_group):
    model = nn.parallel.DistributedDataParallel(Model(p=0.0))
    expected = torch.autograd.grad(model(x).sum(), model.module.embed.weight)[0]
    report = lk.optimize(model, always=True)
    assert len(report.swapped) == len(SWAPPED)
    model(x).sum().backward()
    torch.testing.assert_close(model.module.embed.weight.grad, expected)


def test_fully_shard(x, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Model().eval()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    report = lk.optimize(model, always=True)
    assert not report.swapped and all("DTensor" in e.reason for e in report.kept)


def test_optimize_before_fully_shard(x, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Model(p=0.0)
    stock = copy.deepcopy(model)
    lk.optimize(model, always=True)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    torch.testing.assert_close(model(x), stock(x))


def test_replica_shares_nothing():
    model = Model()
    copied = replica(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert all(p.any() for p in model.parameters())
    attention = nn.MultiheadAttention(8, 2, dropout=0.5)
    assert replica(attention).dropout == 0 and attention.dropout == 0.5


class Attends(nn.Module):
    """Self and cross attention, called by keyword and with masks, as models do."""

    def __init__(self, **options):
        super().__init__()
        self.mha = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)
        self.cross = nn.MultiheadAttention(32, 4, kdim=16, vdim=16, **options)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(self, x, memory, padding=None, float_padding=None):
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.mha(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=False)[0]
        memory = memory.transpose(0, 1)
        y, weights = self.cross(
            x.transpose(0, 1), memory, memory, float_padding, average_attn_weights=False
        )
        return x + y.transpose(0, 1), weights


@pytest.fixture
def attention_inputs():
    torch.manual_seed(0)
    padding = torch.zeros(3, 24, dtype=torch.bool)
    padding[1, 17:] = True
    bias = torch.zeros(3, 40).masked_fill(torch.arange(40) > 31, float("-inf"))
    x, memory = torch.randn(3, 24, 32), torch.randn(3, 40, 16)
    return {"x": x, "memory": memory, "padding": padding, "float_padding": bias}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "bias": False}], ids=str)
def test_attention(attention_inputs, options, given):
    model = Attends(**options).eval()
    before = model(**attention_inputs)
    report = lk.optimize(model, inputs=attention_inputs if given else None, always=True)
    assert {e.module for e in report.swapped} == {"mha", "cross"} and not report.kept, report
    assert all(0 < e.error <= 1 and e.speedup > 0 for e in report.swapped)
    assert type(model.mha) is type(model.cross) is lk.nn.MultiheadAttention
    assert model.mha.dropout == 0.1
    torch.testing.assert_close(model(**attention_inputs), before)
    lk.restore(model)
    assert type(model.mha) is nn.MultiheadAttention
    assert all(torch.equal(a, b) for a, b in zip(model(**attention_inputs), before, strict=True))


def test_a_proof_makes_the_models_own_call(attention_inputs):
    model = Attends()
    call = lambda: model(**attention_inputs)
    found = calls.captured_calls(model, [model.mha, model.cross], call)
    (self_call,), (cross_call,) = found[model.mha], found[model.cross]
    query, key, value = self_call.args
    assert query is key is value and query is not attention_inputs["x"]
    assert self_call.kwargs["need_weights"] is False
    assert self_call.kwargs["attn_mask"].dtype == torch.bool
    assert torch.equal(self_call.kwargs["key_padding_mask"], attention_inputs["padding"])
    assert cross_call.args[1] is cross_call.args[2]
    assert torch.equal(cross_call.args[3], cross_call.args[3])
    assert cross_call.kwargs == {"average_attn_weights": False}
    double = self_call.map(torch.Tensor.double)
    assert double.args[0] is double.args[2] and double.kwargs["need_weights"] is False


@pytest.mark.parametrize("need_weights", [False, True])
def test_queries_that_see_nothing(need_weights):
    """A module is swapped although torch gives NaN for queries that see no key."""
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(32, 4), torch.randn(24, 3, 32)
    inputs = {"query": x, "key": x, "value": x, "need_weights": need_weights}
    inputs["key_padding_mask"] = torch.zeros(3, 24, dtype=torch.bool)
    inputs["key_padding_mask"][2] = True
    before = module(**inputs)[0]
    assert before[:, 2].isnan().all() == need_weights and before[:, :2].isfinite().all()
    assert lk.optimize(module, inputs=inputs, always=True).swapped
    after = module(**inputs)[0]
    assert after.isfinite().all()
    torch.testing.assert_close(after[:, :2], before[:, :2])


def test_torchs_transformer(x):
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Transformer(
        16,
        2,
        1,
        1,
        32,
        dropout=0.0,
        batch_first=True,
        custom_decoder=nn.TransformerDecoder(layer, 2),
    )
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    for training in (False, True):
        model.train(training)
        before = model(x, x, tgt_mask=mask)
        report = lk.optimize(model, verify=False)
        assert sum(e.cls == "MultiheadAttention" for e in report.swapped) == 5
        torch.testing.assert_close(model(x, x, tgt_mask=mask), before)
        lk.restore(model)


def hf_models():
    from transformers import models as m

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "intermediate_size": 64,
    }
    yield m.bert.BertModel(m.bert.BertConfig(**small)), 2
    yield m.roberta.RobertaModel(m.roberta.RobertaConfig(**small, pad_token_id=1)), 2
    yield m.electra.ElectraModel(m.electra.ElectraConfig(**small, embedding_size=32)), 2
    yield m.layoutlm.LayoutLMModel(m.layoutlm.LayoutLMConfig(**small)), 2
    yield m.albert.AlbertModel(m.albert.AlbertConfig(**small, embedding_size=16)), 0


def test_residual_blocks_of_transformers():
    pytest.importorskip("transformers")
    ids = torch.randint(3, 50, (2, 7), generator=testing.generator(0))
    for model, blocks in hf_models():
        model.eval()
        with torch.no_grad():
            before = model(ids).last_hidden_state
            report = lk.optimize(model, inputs={"input_ids": ids}, always=True)
            assert sum("Output" in e.cls for e in report.swapped) == blocks, report
            assert not report.kept, report
            torch.testing.assert_close(model(ids).last_hidden_state, before, atol=1e-5, rtol=1e-4)
