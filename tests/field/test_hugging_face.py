"""Swapped Hugging Face models: attention weights and their gradients, saved and loaded models."""

import copy

import pytest
import torch

import llmos_kernels as lk
from llmos_kernels.testing import assert_accurate

transformers = pytest.importorskip("transformers")
from transformers import models as m  # noqa: E402
from transformers_models import (  # noqa: E402
    MODELS,
    SIZES,
    batch,
    bert,
    build,
    check,
    llama,
    logits_and_gradients,
    roberta,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def electra(**options):
    config = m.electra.ElectraConfig(**SIZES, embedding_size=32, intermediate_size=96, **options)
    return m.electra.ElectraForMaskedLM(config)


def pair(make):
    """Return a model with eager attention, and a swapped copy."""
    stock = build(make, "eager").eval()
    model = copy.deepcopy(stock)
    assert lk.optimize(model, verify=False).entries[0].swapped
    return stock, model


def test_a_model_whose_config_has_output_attentions_is_kept(tmp_path):
    stock = build(bert, "eager").eval()
    stock.config.output_attentions = True
    model = copy.deepcopy(stock)
    report = lk.optimize(model, always=True)
    assert "eager only" in report.entries[0].reason and not report.entries[0].swapped
    given = batch(model)
    for name in ("logits", "attentions"):
        torch.testing.assert_close(model(**given)[name], stock(**given)[name], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)  # Which validates the config.


def test_output_attentions_after_the_swap():
    stock, model = pair(bert)
    given = batch(model)
    with pytest.raises(ValueError, match="'eager'"):
        model.config.output_attentions = True
    assert not model(**given).get("attentions")
    lk.restore(model)
    for either in (stock, model):
        either.config.output_attentions = True
    for ours, expected in zip(model(**given).attentions, stock(**given).attentions, strict=True):
        assert torch.equal(ours, expected)


def attention_gradients(model, given):
    """Return the attention weights of all layers and their gradients, by name."""
    model.zero_grad()
    out = model(**given, output_attentions=True)
    names = [n for n in ("attentions", "decoder_attentions", "cross_attentions") if out.get(n)]
    found = {f"{n} {i}": t for n in names for i, t in enumerate(out[n])}
    for t in found.values():
        t.retain_grad()
    sum(t.square().sum() for t in (out.logits, *found.values())).backward()
    assert found and not any(t.grad is None for t in found.values())
    gradients = {f"gradient of {n}": t.grad for n, t in found.items()}
    seen = {f"parameter {n}": p.grad for n, p in model.named_parameters() if p.dim() > 1}
    return {n: t.detach() for n, t in (found | gradients | seen).items() if t is not None}


@pytest.mark.parametrize("make", MODELS)
def test_attention_weights_retain_gradients(make):
    model = build(make).eval()
    given = batch(model, "right")
    actual = check(model, given, attention_gradients, exact_by="eager")
    assert any(t.abs().max() > 0 for n, t in actual.items() if n.startswith("gradient"))


def test_grouped_heads_retain_gradients_under_dropout():
    model = build(llama, attention_dropout=0.5).train()
    attention_gradients(model, batch(model, None))


@pytest.mark.parametrize("make", [bert, roberta, electra])
def test_inputs_embeds(make):
    model = build(make).eval()
    given = batch(model)
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).detach()
    check(model, given)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("make", [bert, roberta, electra])
def test_swapped_models_are_within_the_budget(make, verify):
    """Every swap together: attention, norms, linear layers and blocks."""
    stock, model = pair(make)
    if verify:
        lk.restore(model)
        lk.optimize(model, inputs=batch(model), always=True)
    for padding in ("left", "right", None):
        given = batch(stock, padding)
        exact = logits_and_gradients(copy.deepcopy(stock).double(), given)
        allowed, actual = logits_and_gradients(stock, given), logits_and_gradients(model, given)
        for name, value in actual.items():
            assert_accurate(value, exact[name], allowed[name], name)


@pytest.mark.parametrize("make", [bert, roberta, electra])
def test_save_and_load(make, tmp_path):
    stock, model = pair(make)
    for name, saved in (("stock", stock), ("ours", model)):
        saved.save_pretrained(tmp_path / name)
    assert (tmp_path / "ours" / "config.json").read_text() == (
        tmp_path / "stock" / "config.json"
    ).read_text()
    loaded = type(stock).from_pretrained(tmp_path / "ours").eval()
    given = batch(model)
    with torch.no_grad():
        loaded.set_attn_implementation("eager")
        assert torch.equal(loaded(**given).logits, stock(**given).logits)
        lk.optimize(loaded, verify=False)
        assert torch.equal(loaded(**given).logits, model(**given).logits)


def sentence_encoder(path):
    """Return a small sentence-transformers model that was saved under ``path``."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(words))
    tokenizer = m.bert.BertTokenizer({w: i for i, w in enumerate(words)})
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    base = build(bert, "sdpa").bert
    base.save_pretrained(path)
    return sentence_transformers.SentenceTransformer(str(path), device="cpu").eval()


def test_sentence_transformers(tmp_path):
    stock = sentence_encoder(tmp_path / "base")
    sentences = ["a b c", "d", "e f g h i j k l m"]
    expected = stock.encode(sentences, convert_to_tensor=True)
    model = copy.deepcopy(stock)
    assert lk.optimize(model, verify=False).swapped
    ours = model.encode(sentences, convert_to_tensor=True)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    model.save(str(tmp_path / "saved"))
    loaded = type(stock)(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(loaded.encode(sentences, convert_to_tensor=True), expected)
    assert not any("llmos_kernels" in type(part).__module__ for part in loaded.modules())
    lk.optimize(loaded, verify=False)
    assert torch.equal(loaded.encode(sentences, convert_to_tensor=True), ours)
