"""optimize(skip_padding=True) on models of transformers: what they return at tokens stays the same.

Whether tokens are the right ones shows in float64, where our ops are their references; their
kernels have tests of their own, and ``optimize`` proves them together.
"""

import copy
import datetime
import pickle
import random

import pytest
import torch
from small_encoders import SIZES, TOKENS, VOCABULARY, model_of
from torch import nn
from transformers import AutoModel
from transformers import models as m

import llmos_kernels as lk
from llmos_kernels.integrations.transformers.padding import PackedStack
from llmos_kernels.testing import make_gradients

NAMED = {
    "bert": model_of("bert", "BertModel"),
    "roberta": model_of("roberta", "RobertaForTokenClassification"),
    "xlm_roberta": model_of("xlm_roberta", "XLMRobertaForSequenceClassification"),
    "camembert": model_of("camembert", "CamembertForMaskedLM"),
    "distilbert": model_of("distilbert", "DistilBertForSequenceClassification"),
    "electra": model_of("electra", "ElectraForPreTraining", embedding_size=16),
    "albert": model_of("albert", "AlbertModel", embedding_size=16, num_hidden_groups=2),
    "answers": model_of("bert", "BertForQuestionAnswering"),
    "bart": model_of("bart", "BartModel"),
}
#: Others, of which each day draws three.
DRAWN = {
    "ernie": model_of("ernie", "ErnieModel"),
    "data2vec": model_of("data2vec", "Data2VecTextModel"),
    "roberta_prelayernorm": model_of("roberta_prelayernorm", "RobertaPreLayerNormModel"),
    "xlm_roberta_xl": model_of("xlm_roberta_xl", "XLMRobertaXLModel"),
    "electra_classes": model_of("electra", "ElectraForSequenceClassification", embedding_size=16),
}
_TODAY = random.Random(datetime.date.today().toordinal())
FAMILIES = NAMED | dict(_TODAY.sample([*DRAWN.items()], 3))
MASKS = {
    "right": [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1] * 6],
    "left": [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1] * 6],
    "holes": [[1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0]],
    "none": [[1] * 6] * 3,
    "nothing in a row": [[1, 1, 1, 1, 0, 0], [0] * 6, [1, 1, 0, 0, 0, 0]],
    "one token": [[1, 0, 0, 0, 0, 0]],
    "nothing": [[0] * 6] * 2,
}


def batch(mask, config, **others):
    """Return tokens with a mask; right padding is in the tokens, too, as RoBERTa counts them."""
    mask = torch.tensor(MASKS[mask])
    ids = torch.randint(3, VOCABULARY, mask.shape)
    given = {"input_ids": ids, "attention_mask": mask, **others}
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = ids.flip(1)[:, :4]
    return given


def results(model, given):
    """Return the results that matter, and the gradients of all parameters."""
    mask = given["attention_mask"].bool()
    out = model(**given)
    found = [t[mask] if t.shape[:2] == mask.shape else t for t in tensors(out.values())]
    parameters = [*model.parameters()]
    gradients = torch.autograd.grad(found, parameters, make_gradients(found), allow_unused=True)
    return found, [torch.zeros(()) if g is None else g for g in gradients]


def tensors(values):
    for v in values:
        if isinstance(v, torch.Tensor):
            yield v
        elif isinstance(v, tuple):
            yield from tensors(v)


def skipping(model, **options):
    """Let a model skip its padding, and return it in float64, with the record of its packs."""
    report = lk.optimize(model, verify=False, skip_padding=True, **options)
    assert [p.skipped for p in report.padding] == [True], report
    return model.double()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_at_tokens_nothing_changes(family, mask, packs):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    given = batch(mask, model.config)
    stock = copy.deepcopy(model).double()
    stock.set_attn_implementation("sdpa")
    model = skipping(model)
    packs.clear()
    expected, actual = results(stock, given), results(model, given)
    if mask == "nothing":
        assert not packs
        return
    if mask == "nothing in a row":  # There eager attention gives numbers without a meaning.
        expected, actual = ([t for t in r[0] if len(t) == 6] for r in (expected, actual))
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    total = int(given["attention_mask"].sum())
    reads_first = mask in ("left", "nothing in a row")  # Without proof a head is taken to do so.
    assert set(packs) == (set() if mask == "none" or reads_first else {total})


@pytest.mark.parametrize("family", ["bert", "roberta", "bart", [*FAMILIES][-1]])
def test_proof_and_restore(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    classes = [type(part) for part in model.modules()]
    given = batch("right", model.config)
    before = model(**given)[0]
    report = lk.optimize(model, inputs=given, skip_padding=True, always=True)
    (padding,) = report.padding
    assert padding.skipped and padding.error <= 1 and padding.fill == 10 / 18, padding
    assert "skips padding, 56% of the positions are tokens: the model" in str(report)
    again = lk.optimize(model, skip_padding=True, verify=False)
    assert again.padding[0].skipped and again.padding[0].reason == "already"
    lk.restore(model)
    assert [type(part) for part in model.modules()] == classes
    assert torch.equal(model(**given)[0], before)
    marks = [k for part in model.modules() for k in vars(part) if k.startswith("_llmos")]
    assert not marks


def test_heads_that_read_the_first_position_are_found(packs):
    pooled, plain = (
        m.bert.BertModel(m.bert.BertConfig(**SIZES), add_pooling_layer=pool).eval()
        for pool in (True, False)
    )
    for model in (pooled, plain):
        lk.optimize(model, skip_padding=True, always=True)
        packs.clear()
        given = batch("left", model.config)
        with torch.no_grad():
            model(**given)
        assert bool(packs) == (model is plain)


def test_losses_that_read_padding_are_computed_with_it(packs):
    torch.manual_seed(0)
    model = FAMILIES["roberta"]()
    stock = copy.deepcopy(model).double()
    model = skipping(model)
    mask = torch.tensor(MASKS["right"])
    labels = torch.randint(2, mask.shape)
    for given, packed in ((labels, False), (labels.masked_fill(mask == 0, -100), True)):
        call = batch("right", model.config, labels=given)
        packs.clear()
        torch.testing.assert_close(model(**call).loss, stock(**call).loss)
        assert bool(packs) == packed
    model = FAMILIES["answers"]()
    stock = copy.deepcopy(model).double()
    model = skipping(model)
    positions = {"start_positions": torch.tensor([0, 0, 3]), "end_positions": torch.tensor([1] * 3)}
    call = batch("right", model.config, **positions)
    packs.clear()
    torch.testing.assert_close(model(**call).loss, stock(**call).loss)
    assert not packs
    out = model(**batch("right", model.config))
    bias = model.qa_outputs.bias[0].expand(3)
    assert packs and torch.equal(out.start_logits[0, 3:], bias)


def test_weights_and_hidden_states(packs):
    torch.manual_seed(0)
    model = FAMILIES["bert"]().eval()
    stock = copy.deepcopy(model).double()
    stock.set_attn_implementation("eager")
    model = skipping(model)
    packs.clear()
    call = batch("right", model.config, output_attentions=True)
    assert len(model(**call).attentions) == 2 and not packs
    call = batch("right", model.config, output_hidden_states=True)
    mask = call["attention_mask"].bool()
    actual, expected = model(**call), stock(**call)
    assert packs
    for a, e in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[mask], e[mask])
    assert not actual.hidden_states[-1][~mask].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_does_not_leak(value):
    model = skipping(FAMILIES["bert"]().eval())
    given = batch("right", model.config)
    given["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, 7)
    given["input_ids"][given["attention_mask"] == 1] %= 5
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7] = value
    found, gradients = results(model, given)
    assert all(t.isfinite().all() for t in (*found, *gradients))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_gradient_checkpointing(family, reentrant, packs):
    torch.manual_seed(0)
    model = skipping(FAMILIES[family]()).train()
    given = batch("right", model.config)
    expected = results(model, given)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
        loss = model(**given)[0].sum()
        loss.backward()  # torch.autograd.grad does not go with it.
        gradient = next(model.parameters()).grad
        assert gradient.isfinite().all() and packs
        return
    actual = results(model, given)
    torch.testing.assert_close(actual, expected)


def test_dropout_is_replayed():
    model = m.bert.BertModel(m.bert.BertConfig(**SIZES)).train()
    lk.optimize(model, verify=False, skip_padding=True)
    given = batch("right", model.config)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(results(model, given))
    for a, b in zip(runs[0][0] + runs[0][1], runs[1][0] + runs[1][1], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(runs[0][0][0], runs[2][0][0])


def test_copies_pickles_and_saved_models(tmp_path):
    model = FAMILIES["bert"]().eval()
    lk.optimize(model, verify=False, skip_padding=True)
    given = batch("right", model.config)
    expected = model(**given)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.encoder, PackedStack)
        assert torch.equal(other(**given)[0], expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["BertModel"] and type(loaded) is m.bert.BertModel


def test_one_op_layers_and_int8_run_packed(packs, our_forward):
    torch.manual_seed(0)
    model = m.bert.BertModel(m.bert.BertConfig(**SIZES)).eval()
    stock = copy.deepcopy(model)
    given = batch("right", model.config)
    mask = given["attention_mask"].bool()
    lk.optimize(model, verify=False, skip_padding=True)
    packs.clear()
    handle = torch.ops.llmos.encoder_layer.default
    with torch.profiler.profile() as profile, torch.no_grad():
        out = model(**given)[0]
    calls = [e.count for e in profile.key_averages() if e.key == handle.name().partition(".")[0]]
    assert calls == [2] and packs == [10]
    torch.testing.assert_close(out[mask], stock(**given)[0][mask])
    lk.quantize(model, always=True)
    packs.clear()
    with torch.no_grad():
        out = model(**given)[0]
    assert packs == [10] and not out[~mask].any()
    torch.testing.assert_close(out[mask], stock(**given)[0][mask], rtol=0.1, atol=0.1)


KEPT = {
    "XmodModel": (model_of("xmod", "XmodModel", default_language="en_XX", languages=["en_XX"]), ""),
    "T5EncoderModel": (
        lambda: m.t5.T5EncoderModel(
            m.t5.T5Config(d_model=32, d_kv=8, num_heads=4, num_layers=1, **TOKENS)
        ),
        "relative positions",
    ),
    "GPT2Model": (
        lambda: m.gpt2.GPT2Model(m.gpt2.GPT2Config(n_embd=32, n_layer=1, n_head=4, **TOKENS)),
        "no encoder in it takes its attention from AttentionInterface",
    ),
    "MPNetModel": (
        lambda: m.mpnet.MPNetModel(m.mpnet.MPNetConfig(**SIZES)),
        "does not take its attention from AttentionInterface",
    ),
    "ModernBertModel": (
        lambda: m.modernbert.ModernBertModel(m.modernbert.ModernBertConfig(**SIZES)),
        "",
    ),
    "chunks": (
        lambda: m.bert.BertModel(m.bert.BertConfig(**SIZES, chunk_size_feed_forward=2)),
        "chunk_size_feed_forward",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_models_that_cannot_are_kept_with_the_reason(name):
    verify = name in ("XmodModel", "MPNetModel")
    make, why = KEPT[name]
    model = make().eval()
    classes = [type(part) for part in model.modules()]
    report = lk.optimize(model, skip_padding=True, verify=verify)
    (padding,) = report.padding
    assert not padding.skipped and why in padding.reason and padding.reason in str(report)
    lk.restore(model)
    assert [type(part) for part in model.modules()] == classes
    with pytest.raises(ValueError, match=r"padding that is|modules that cannot be"):
        lk.optimize(model, skip_padding=True, strict=True, verify=verify)
    assert [type(part) for part in model.modules()] == classes


def test_inputs_without_a_mask_are_a_reason():
    model = FAMILIES["bert"]().eval()
    given = {"input_ids": torch.randint(3, VOCABULARY, (2, 5))}
    (padding,) = lk.optimize(model, inputs=given, skip_padding=True).padding
    assert padding.reason == "inputs have no attention_mask [batch, length]"
    assert padding.fill is None and not padding.skipped


def test_a_switch_that_is_no_bool():
    with pytest.raises(TypeError, match="skip_padding must be a bool, got 'yes'"):
        lk.optimize(nn.Linear(2, 2), skip_padding="yes")


def test_another_attention_chosen_since(packs):
    torch.manual_seed(0)
    model = FAMILIES["bert"]().eval()
    given = batch("right", model.config)
    mask = given["attention_mask"].bool()
    expected = model(**given)[0][mask]
    lk.optimize(model, verify=False, skip_padding=True)
    for name, packed in (("sdpa", False), ("eager", False), ("llmos", True)):
        model.set_attn_implementation(name)
        packs.clear()
        torch.testing.assert_close(model(**given)[0][mask], expected, atol=1e-5, rtol=1e-4)
        assert bool(packs) == packed


def test_ids_that_broadcast():
    torch.manual_seed(0)
    model = FAMILIES["bert"]().eval()
    stock = copy.deepcopy(model).double()
    model = skipping(model)
    column, row = torch.tensor([[0], [1], [1]]), torch.arange(6)
    for others in (
        {"token_type_ids": column},
        {"token_type_ids": column[1:2]},
        {"position_ids": row, "token_type_ids": column.expand(3, 6)},
        {"position_ids": row[None].flip(1)},
        {"position_ids": column + 3, "token_type_ids": column.expand(3, 6)},
    ):
        given = batch("right", model.config, **others)
        mask = given["attention_mask"].bool()
        torch.testing.assert_close(model(**given)[0][mask], stock(**given)[0][mask])
    for others in ({"token_type_ids": torch.zeros(3, 9).long()}, {"position_ids": row[None, :4]}):
        with pytest.raises(RuntimeError):
            model(**batch("right", model.config, **others))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_embeddings_that_are_given(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    stock = copy.deepcopy(model).double()
    model = skipping(model)
    given = batch("right", model.config)
    mask = given["attention_mask"].bool()
    clean = stock.get_input_embeddings()(given.pop("input_ids")).detach()
    expected = stock(inputs_embeds=clean, **given)[0][mask]
    dirty = clean.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    out = model(inputs_embeds=dirty, **given)[0][mask]
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert dirty.grad.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_other_reasons():
    model = FAMILIES["bert"]().eval()
    given = batch("right", model.config)
    doubled = given | {"attention_mask": given["attention_mask"] * 2}
    (padding,) = lk.optimize(model, inputs=doubled, skip_padding=True).padding
    assert padding.reason == "attention_mask has other values than 0 and 1"
    whole = given | {"attention_mask": torch.ones_like(given["attention_mask"])}
    (padding,) = lk.optimize(model, inputs=whole, skip_padding=True).padding
    assert padding.reason == "inputs have no padding" and padding.fill == 1
    (padding,) = lk.optimize(nn.Linear(2, 2), verify=False, skip_padding=True).padding
    assert padding.reason == "it has no encoder of transformers or torch"
