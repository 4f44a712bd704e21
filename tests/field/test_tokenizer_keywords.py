"""What a tokenizer returns besides the ids does not stop the attention: it does not concern it."""

import pytest
import torch

import llmos_kernels as lk

models = pytest.importorskip("transformers.models")


def test_keywords_that_do_not_concern_the_attention():
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    model = models.llama.LlamaModel(models.llama.LlamaConfig(**sizes, num_attention_heads=2)).eval()
    lk.optimize(model, verify=False)
    ids = torch.randint(99, (2, 7))
    with torch.no_grad():
        expected = model(ids)[0]
        keywords = {
            "special_tokens_mask": torch.zeros_like(ids),
            "offset_mapping": torch.zeros(2, 7, 2, dtype=torch.long),
        }
        assert torch.equal(model(ids, **keywords)[0], expected)
        with pytest.raises(NotImplementedError, match="head_gates"):
            model(ids, head_gates=torch.ones(2))
