"""A swapped model that is unpickled in a fresh process has its attention there.

After OpenBMB/UltraRAG #111: models that are sent to spawned processes.
"""

import pickle
import subprocess
import sys

import pytest
import torch

import llmos_kernels as lk

models = pytest.importorskip("transformers.models")

READER = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    model = pickle.load(file)
with torch.no_grad():
    torch.save(model(torch.arange(20).view(2, 10))[0], sys.argv[2])
"""


PART_READER = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    part = pickle.load(file)
if "Config" in type(part).__name__:
    import transformers
    part = transformers.BertModel(part).encoder
with torch.no_grad():
    part(torch.randn(2, 5, 32))
"""


@pytest.mark.parametrize("part", ["encoder", "encoder.layer.0", "config"])
def test_a_part_in_a_fresh_process(tmp_path, part):
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    model = models.bert.BertModel(models.bert.BertConfig(**sizes, num_attention_heads=2)).eval()
    assert lk.optimize(model, verify=False).swapped
    file = tmp_path / "part.pickle"
    given = model.config if part == "config" else model.get_submodule(part)
    file.write_bytes(pickle.dumps(given))
    subprocess.run([sys.executable, "-c", PART_READER, file], check=True)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_fresh_process(tmp_path, quantize):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    config = models.bert.BertConfig(**sizes, num_attention_heads=2)
    model = models.bert.BertModel(config).eval()
    assert lk.optimize(model, verify=False).swapped
    if quantize:
        lk.quantize(model, always=True)
    with torch.no_grad():
        expected = model(torch.arange(20).view(2, 10))[0]
    file, result = tmp_path / "model.pickle", tmp_path / "result.pt"
    file.write_bytes(pickle.dumps(model))
    subprocess.run([sys.executable, "-c", READER, file, result], check=True)
    assert torch.equal(torch.load(result), expected)
