"""A BERT layer at inference is one op; where its modules do more, its own forward runs."""

import copy
import functools
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import llmos_kernels as lk
from llmos_kernels.swap.calls import ModuleCall
from llmos_kernels.swap.proof import Replicas, judge
from llmos_kernels.testing import DTYPES, OpRecorder, assert_within_budget

pytestmark = pytest.mark.usefixtures("our_forward")
models = pytest.importorskip("transformers.models")
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
}
CLASSES = {
    "bert": (models.bert.BertConfig, models.bert.BertModel),
    "roberta": (models.roberta.RobertaConfig, models.roberta.RobertaModel),
    "electra": (models.electra.ElectraConfig, models.electra.ElectraModel),
    "camembert": (models.camembert.CamembertConfig, models.camembert.CamembertModel),
}
each_class = pytest.mark.parametrize("name", CLASSES)


def model(name="bert", implementation="sdpa", **options):
    """Return a model in eval mode, whose parameters are not small."""
    torch.manual_seed(0)
    config, cls = CLASSES[name]
    made = cls(config(**SIZES | options)).eval()
    for p in made.encoder.parameters():
        nn.init.normal_(p, std=0.3)
    made.set_attn_implementation(implementation)
    return made


def is_swapped(layer):
    return type(layer).__name__.startswith("Fused")


def swapped(*args, **options):
    """Return a stock model, and its copy with swapped layers."""
    stock = model(*args, **options)
    ours = copy.deepcopy(stock)
    lk.optimize(ours, verify=False)
    assert all(map(is_swapped, ours.encoder.layer))
    return stock, ours


def tokens(padded=True):
    ids = torch.arange(2 * 9).view(2, 9) % 90 + 5
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}


def whole_layers(module, **given):
    """Return how many layers are the one op in a call of ``module``, and the output."""
    with OpRecorder() as record:
        out = module(**given)
    return sum(op.name() == "llmos::encoder_layer" for op, _ in record.calls), out


def close(ours, stock, **given):
    """Assert that both models return the same hidden states where there is no padding."""
    with torch.no_grad():
        pair = [m(**given).last_hidden_state for m in (ours, stock)]
    keep = given.get("attention_mask", torch.ones(2, 9)).bool()
    torch.testing.assert_close(*(t[keep] for t in pair))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_proof_accepts_it(implementation):
    """On random inputs with padding, and on the user's."""
    for inputs in (None, tokens()):
        ours = model(implementation=implementation)
        report = lk.optimize(ours, inputs=inputs, always=True)
        assert all(map(is_swapped, ours.encoder.layer)), report.details()


@each_class
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_models(name, implementation, padded):
    stock, ours = swapped(name, implementation)
    assert whole_layers(ours, **tokens(padded))[0] == 2
    close(ours, stock, **tokens(padded))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_error_budget(dtype):
    stock, ours = (m.to(dtype) for m in swapped())
    exact = copy.deepcopy(stock).double()
    results = []
    for length in (1, 12, 40):
        x = torch.randn(3, length, 32).to(dtype)
        visible = torch.arange(length) < torch.linspace(1, length, 3)[:, None]
        mask = visible[:, None, None].expand(-1, -1, length, -1)
        triple = [
            m.encoder.layer[0](t, mask) for m, t in ((ours, x), (exact, x.double()), (stock, x))
        ]
        results.append({"output": tuple(triple)})
    assert_within_budget(results, "BertLayer")


@torch.no_grad()
def test_after_hidden_states_were_asked_for():
    """transformers leaves hooks on layers and attentions, which record nothing later."""
    stock, ours = swapped()
    for options in ({"output_hidden_states": True}, {"output_attentions": True}):
        found = [
            m.set_attn_implementation("eager") or m(**tokens(), **options) for m in (stock, ours)
        ]
        for a, b in zip(*(f.hidden_states or f.attentions for f in found), strict=True):
            keep = tokens()["attention_mask"].bool()
            a, b = (a[keep], b[keep]) if a.ndim == 3 else (a[0], b[0])
            torch.testing.assert_close(a, b)
    assert whole_layers(ours, **tokens())[0] == 2
    close(ours, stock, **tokens())


def hook(module):
    module.register_forward_hook(lambda *args: None)


def forward(module):
    module.forward = module.forward


PARTS = [name for name, _ in model().encoder.layer[0].named_modules() if name]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", [hook, forward], ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_part_that_does_more(part, change):
    stock, ours = swapped()
    change(ours.encoder.layer[0].get_submodule(part))
    assert whole_layers(ours, **tokens())[0] == 1
    close(ours, stock, **tokens())


class Other(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x):
        return super().forward(x) * 2


def other_linear(layer):
    other = Other(32, 32)
    other.load_state_dict(layer.attention.self.key.state_dict())
    layer.attention.self.key = other


def other_activation(layer):
    layer.intermediate.intermediate_act_fn = nn.Tanh()


def other_output(layer):
    class Output(type(layer.output)):
        def forward(self, *args):
            return super().forward(*args) + 1

    layer.output.__class__ = Output


def causal(layer):
    layer.attention.self.is_causal = True


def without_dropout(layer):
    layer.output.dropout = nn.Identity()


CHANGES = [other_linear, other_activation, other_output, causal, without_dropout]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_changed_layer(change):
    stock, ours = swapped()
    for m in (stock, ours):
        change(m.encoder.layer[0])
    assert whole_layers(ours, **tokens(False))[0] == 1
    close(ours, stock, **tokens(False))


@torch.no_grad()
def test_another_attention():
    from transformers import AttentionInterface

    def twice(module, query, key, value, mask, **options):
        return 2 * value.transpose(1, 2), None

    AttentionInterface.register("twice", twice)
    stock, ours = swapped()
    for m in (stock, ours):
        m.config._attn_implementation = "twice"
    assert whole_layers(ours, **tokens(False))[0] == 0
    close(ours, stock, **tokens(False))


@torch.no_grad()
def test_captured_outputs():
    stock, ours = swapped(implementation="eager")
    for m in (stock, ours):
        m.set_attn_implementation("eager")
    for wanted in ("output_hidden_states", "output_attentions"):
        expected, found = (m(**tokens(False), **{wanted: True}) for m in (stock, ours))
        assert found.keys() == expected.keys()
        for key in list(found):
            torch.testing.assert_close(found[key], expected[key])


@torch.no_grad()
def test_further_arguments():
    stock, ours = swapped()
    position_ids = torch.arange(9).flip(0)[None]
    assert whole_layers(ours, **tokens(), position_ids=position_ids)[0] == 0
    close(ours, stock, **tokens(), position_ids=position_ids)
    layer, x = ours.encoder.layer[0], torch.randn(2, 9, 32)
    expected = stock.encoder.layer[0](x)
    torch.testing.assert_close(layer(hidden_states=x, attention_mask=None), expected)
    assert whole_layers(layer, hidden_states=x, attention_mask=None)[0] == 1
    with pytest.raises(TypeError):
        layer()


def test_training():
    stock, ours = swapped(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    found = []
    for m in (stock, ours):
        m.train()
        assert whole_layers(m, **tokens())[0] == 0
        m(**tokens()).last_hidden_state[:, 0].square().sum().backward()
        found.append([p.grad for p in m.encoder.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing():
    """transformers wraps the forward of each layer class: a layer runs again in the backward."""
    stock, ours = swapped()
    counts = []
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    for m in (stock, ours):
        m.train()
        for layer in m.encoder.layer:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = checkpoint
        calls = []
        m.encoder.layer[0].intermediate.dense.register_forward_hook(
            lambda *args, calls=calls: calls.append(1)
        )
        m(**tokens()).last_hidden_state.sum().backward()
        counts.append(len(calls))
    assert counts == [2, 2]


@torch.no_grad()
def test_copies_and_restore():
    stock, ours = swapped()
    expected = ours(**tokens()).last_hidden_state
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert whole_layers(made, **tokens())[0] == 2
        assert torch.equal(made(**tokens()).last_hidden_state, expected)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    lk.restore(ours)
    assert type(ours.encoder.layer[0]) is type(stock.encoder.layer[0])
    assert whole_layers(ours, **tokens())[0] == 0


@torch.no_grad()
def test_parameters_are_read_at_each_call():
    stock, ours = swapped()
    ours(**tokens())
    for m in (stock, ours):
        m.encoder.layer[1].attention.self.query.weight.data.mul_(2)
        m.encoder.layer[1].output.dense.weight = nn.Parameter(
            m.encoder.layer[0].output.dense.weight
        )
    close(ours, stock, **tokens())


@torch.no_grad()
def test_exports_the_parts():
    _, ours = swapped()
    x = torch.randn(2, 9, 32)
    exported = torch.export.export(ours.encoder.layer[0], (x,))
    assert "encoder_layer" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x), ours.encoder.layer[0](x))


def test_layers_of_other_kinds_are_kept():
    config = models.bert.BertConfig(**SIZES, is_decoder=True)
    decoder = models.bert.BertModel(config).eval()
    lk.optimize(decoder, always=True)
    assert not is_swapped(decoder.encoder.layer[0])
    config = models.roformer.RoFormerConfig(**SIZES)
    rotary = models.roformer.RoFormerModel(config).eval()
    lk.optimize(rotary, always=True)
    assert not is_swapped(rotary.encoder.layer[0])


def test_a_subclass_of_the_users_is_kept():
    class Layer(models.bert.modeling_bert.BertLayer):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) + 1

    layer = Layer(models.bert.BertConfig(**SIZES)).eval()
    lk.optimize(layer, always=True)
    assert type(layer) is Layer


def test_the_proof_sees_what_runs_without_gradients():
    class Wrong(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 if torch.is_grad_enabled() else 1.01)

    layer, call = nn.Linear(8, 8), ModuleCall((torch.randn(4, 8),))
    replicas = Replicas.of(layer, Wrong)
    assert judge(replicas, call) <= 1 < judge(replicas, call, extent="inference")
    assert judge(Replicas.of(layer, lk.nn.Linear), call, extent="inference") <= 1
