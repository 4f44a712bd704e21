"""Small Hugging Face models, their inputs, and comparisons of their results."""

import copy
import itertools

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import models as m
from transformers.masking_utils import sdpa_mask

import llmos_kernels as lk
from llmos_kernels import testing
from llmos_kernels.testing import assert_accurate, make_gradients

BATCH, LENGTH, VOCABULARY = 3, 20, 60
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS}
SEQ2SEQ = {"d_model": 64, "decoder_start_token_id": 1, **TOKENS}


def bert(**options):
    config = m.bert.BertConfig(**SIZES, intermediate_size=96, **options)
    return m.bert.BertForMaskedLM(config)


def roberta(**options):
    config = m.roberta.RobertaConfig(**SIZES, intermediate_size=96, **options)
    return m.roberta.RobertaForMaskedLM(config)


def distilbert(**options):
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, **TOKENS}
    return m.distilbert.DistilBertForMaskedLM(m.distilbert.DistilBertConfig(**sizes, **options))


def gpt2(**options):
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, **TOKENS}
    return m.gpt2.GPT2LMHeadModel(m.gpt2.GPT2Config(**sizes, **options))


def opt(**options):
    config = m.opt.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64, **options)
    return m.opt.OPTForCausalLM(config)


def llama(**options):
    config = m.llama.LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=96, **options)
    return m.llama.LlamaForCausalLM(config)


def gemma2(**options):
    sizes = {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16}
    capped = {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 16, "sliding_window": 6}
    config = m.gemma2.Gemma2Config(**SIZES, **sizes, **capped, tie_word_embeddings=False, **options)
    return m.gemma2.Gemma2ForCausalLM(config)


def gpt_oss(**options):
    """Return a model with attention sinks, whose tokens go to every expert: none is near a tie."""
    sizes = {"num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 6}
    config = m.gpt_oss.GptOssConfig(**SIZES, **sizes, **experts, **options)
    model = m.gpt_oss.GptOssForCausalLM(config)
    model.set_experts_implementation("eager")  # The others do not run in float64.
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.sinks)
    return model


def t5(**options):
    sizes = {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    return m.t5.T5ForConditionalGeneration(m.t5.T5Config(**SEQ2SEQ, **sizes, **options))


def bart(**options):
    sizes = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))
    }
    return m.bart.BartForConditionalGeneration(m.bart.BartConfig(**SEQ2SEQ, **sizes, **options))


DROPOUT = {
    bert: ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    roberta: ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    distilbert: ("dropout", "attention_dropout"),
    gpt2: ("embd_pdrop", "resid_pdrop", "attn_pdrop"),
    opt: ("dropout", "attention_dropout"),
    llama: ("attention_dropout",),
    t5: ("dropout_rate",),
    bart: ("dropout", "activation_dropout", "attention_dropout"),
}
MODELS = list(DROPOUT)
GENERATORS = [gpt2, opt, llama, t5, bart]
#: Models that transformers runs with eager attention alone: with softcap, with sinks.
EAGER = [gemma2, gpt_oss]


def build(make, attention="llmos", **options):
    """Return a model without dropout, with weights that make its attention far from uniform."""
    torch.manual_seed(0)
    model = make(**dict.fromkeys(DROPOUT.get(make, ()), 0.0) | options)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.15)
    model.set_attn_implementation(attention)
    return model


def batch(model, padding="left"):
    """Return random tokens and a mask; for encoder-decoder models both inputs, of other lengths.

    No value in front of a ReLU is next to 0, where rounding decides whether it has a gradient.
    """
    return next(
        given
        for seed in itertools.count(1)
        if not _is_near_kink(model, given := _random_batch(model, padding, seed))
    )


def _random_batch(model, padding, seed):
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=testing.generator(seed))
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :1] = 0
    mask = mask.flip(1) if padding == "right" else mask
    given = {"input_ids": ids.where(mask.bool(), 0)}
    if padding:
        given["attention_mask"] = mask
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids.flip(1)[:, :-3]
    return given


def _is_near_kink(model, given):
    """Return True if a ReLU of the model gets a value that rounding may take to the other side."""
    if not any(isinstance(module, nn.ReLU) for module in model.modules()):
        return False
    wide = copy.deepcopy(model).double()
    lk.restore(wide)
    near = []

    def look(module, inputs):
        (z,) = inputs
        near.append(z.abs().min() <= 16 * torch.finfo(torch.float32).eps * z.abs().max())

    for module in wide.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(look)
    with torch.no_grad():
        wide(**given)
    assert near, "no ReLU was called"
    return any(near)


def seen(logits, given):
    """Return the logits of real tokens; causal attention at left padding sees no key."""
    mask = given.get("attention_mask")
    whole = mask is None or mask.dim() != 2 or "decoder_input_ids" in given
    return logits if whole else logits[mask.bool()]


def logits_and_gradients(model, given):
    """Return the logits, the gradient of each matrix, and those of all vectors as one tensor."""
    out = seen(model(**given).logits, given)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, parameters, make_gradients([out]))
    matrices = {n: g for n, g in zip(names, gradients, strict=True) if g.dim() > 1}
    # The gradient of a key bias is 0 but for rounding, so vectors are judged together.
    vectors = [g.flatten() for g in gradients if g.dim() <= 1]
    return {"logits": out.detach(), **matrices, "vectors": torch.cat([*vectors, out.new_zeros(1)])}


def exact_attention(module, q, k, v, mask, scaling=None, softcap=None, s_aux=None, **_):
    """Return attention with softcap and sinks by its formula; eager's softmax is float32."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    logits = q @ k.mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(logits.shape[2:], dtype=torch.bool).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    if s_aux is not None:
        column = s_aux[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], -1)
    weights = logits.softmax(-1).nan_to_num(0.0)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2), None


AttentionInterface.register("exact", exact_attention)
AttentionMaskInterface.register("exact", sdpa_mask)


def check(model, given, run=logits_and_gradients, exact_by="sdpa"):
    """Assert the error budget of ``run`` with our attention; return its results.

    The exact result is that of ``exact_by`` in float64, the budget's that of eager attention in
    float32. In float64 eager attention gives NaN for queries that see no key in some models.
    """
    actual = run(model, given)
    model.set_attn_implementation(exact_by)
    exact = run(copy.deepcopy(model).double(), given)
    model.set_attn_implementation("eager")
    eager = run(model, given)
    model.set_attn_implementation("llmos")
    for name, value in actual.items():
        assert exact[name].isfinite().all(), name
        assert_accurate(value, exact[name], eager[name], name)
    return actual
