"""Families of transformers with attention in code of their own, which the matcher finds."""

import copy

import pytest

pytest.importorskip("transformers")
import torch
from transformers import models as m

import llmos_kernels as lk

pytestmark = pytest.mark.usefixtures("untimed")

BERT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GPT = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
XLM = {"vocab_size": 100, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
FALCON = {k: v for k, v in BERT.items() if not k.startswith(("inter", "max"))}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}


def luke():
    config = m.luke.LukeConfig(**BERT, entity_vocab_size=20, entity_emb_size=16)
    return m.luke.LukeModel(config)


def tapas():
    types = [3, 256, 256, 2, 256, 256, 10]
    return m.tapas.TapasModel(m.tapas.TapasConfig(**BERT, type_vocab_sizes=types))


def gpt_neo():
    kinds = [[["global", "local"], 1]]
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    config = m.gpt_neo.GPTNeoConfig(**sizes, attention_types=kinds, max_position_embeddings=64)
    return m.gpt_neo.GPTNeoModel(config)


def fsmt():
    tokens = {"langs": ["en", "de"], "src_vocab_size": 100, "tgt_vocab_size": 100}
    return m.fsmt.FSMTModel(m.fsmt.FSMTConfig(**SEQ2SEQ, **tokens, use_cache=False))


#: A model of each family, with the attentions, and the feed-forwards inline in a forward, that are
#: replaced.
FAMILIES = {
    "rembert": (
        lambda: m.rembert.RemBertModel(
            m.rembert.RemBertConfig(**BERT, input_embedding_size=16, output_embedding_size=16)
        ),
        2,
        0,
    ),
    "megatron_bert": (
        lambda: m.megatron_bert.MegatronBertModel(m.megatron_bert.MegatronBertConfig(**BERT)),
        2,
        0,
    ),
    "roformer": (
        lambda: m.roformer.RoFormerModel(m.roformer.RoFormerConfig(**BERT, embedding_size=32)),
        2,
        0,
    ),
    "luke": (luke, 2, 0),
    "tapas": (tapas, 2, 0),
    "xlm": (lambda: m.xlm.XLMModel(m.xlm.XLMConfig(**XLM)), 2, 2),
    "flaubert": (lambda: m.flaubert.FlaubertModel(m.flaubert.FlaubertConfig(**XLM)), 2, 2),
    "gptj": (lambda: m.gptj.GPTJModel(m.gptj.GPTJConfig(**GPT, rotary_dim=4)), 2, 0),
    "gpt_neo": (gpt_neo, 2, 0),
    "falcon": (lambda: m.falcon.FalconModel(m.falcon.FalconConfig(**FALCON)), 2, 0),
    "bloom": (
        lambda: m.bloom.BloomModel(
            m.bloom.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4)
        ),
        2,
        0,
    ),
    "fsmt": (fsmt, 6, 4),
    "opt": (
        lambda: m.opt.OPTModel(m.opt.OPTConfig(**BERT, ffn_dim=64, word_embed_proj_dim=32)),
        0,
        2,
    ),
    "bart": (lambda: m.bart.BartModel(m.bart.BartConfig(vocab_size=100, **SEQ2SEQ)), 0, 4),
}


def inputs(model):
    given = {"input_ids": torch.randint(5, 95, (2, 12)), "attention_mask": torch.ones(2, 12).long()}
    given["attention_mask"][0, 8:] = 0
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(5, 95, (2, 7))
    return given


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_found(name):
    torch.manual_seed(0)
    make, attentions, feed_forwards = FAMILIES[name]
    model = make().eval()
    given, stock = inputs(model), copy.deepcopy(model)
    report = lk.optimize(model, inputs=given, always=True)
    sites = [s for s in report.sites() if not s.endswith(", kept")]
    assert sum(s.startswith("attention in ") for s in sites) == attentions, report.details()
    assert sum(s.startswith("feed-forward in ") for s in sites) == feed_forwards, report.details()
    with torch.no_grad():
        ours, theirs = model(**given)[0], stock(**given)[0]
    if ours.shape[1] == 12:  # Of positions that are padding nothing is expected.
        seen = given["attention_mask"].bool()
        ours, theirs = ours[seen], theirs[seen]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    lk.restore(model)
    with torch.no_grad():
        assert torch.equal(model(**given)[0], stock(**given)[0])


def test_generation_with_a_cache():
    torch.manual_seed(0)
    config = m.gptj.GPTJConfig(**GPT, rotary_dim=4, bos_token_id=1, eos_token_id=2)
    model = m.gptj.GPTJForCausalLM(config).eval()
    given, stock = {"input_ids": torch.randint(5, 95, (2, 12))}, copy.deepcopy(model)
    lk.optimize(model, inputs=given, always=True)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**given, **options), stock.generate(**given, **options))


def test_attention_weights_are_those_of_stock():
    torch.manual_seed(0)
    model = FAMILIES["rembert"][0]().eval()
    given, stock = inputs(model), copy.deepcopy(model)
    lk.optimize(model, inputs=given, always=True)
    with torch.no_grad():
        ours, theirs = (f(**given, output_attentions=True).attentions for f in (model, stock))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a + 0, b)
