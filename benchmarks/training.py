"""Train stock and swapped models from the same seed, and compare their loss curves.

    python benchmarks/training.py            # writes to build/results/training/

The text is the docstrings of Python's own library, as bytes. Two models: a causal language model of
four ``nn.TransformerEncoderLayer``, and a BERT of four layers that fills in masked bytes. Each
trains with dropout (stock with two seeds, swapped with the first of them) and without: stock,
swapped, and stock again with one weight changed by one unit in the last place, which shows how far
rounding alone can drive two curves apart.
"""

import argparse
import ast
import json
import sysconfig
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import llmos_kernels as lk

BATCH, LENGTH, WIDTH, HEADS, HIDDEN, LAYERS, BYTES = 16, 128, 128, 4, 512, 4, 256
MASK = BYTES  # A token of its own.
RUNS = {
    "stock": (0.1, 0, False, False),
    "stock, another seed": (0.1, 1, False, False),
    "swapped": (0.1, 0, True, False),
    "stock, no dropout": (0.0, 0, False, False),
    "swapped, no dropout": (0.0, 0, True, False),
    "one ulp apart, no dropout": (0.0, 0, False, True),
}


def text() -> torch.Tensor:
    """Return the docstrings of the standard library as a tensor of bytes."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found += [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, kinds)]
    data = "\n\n".join(d for d in found if d).encode()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


class CausalModel(nn.Module):
    """Post-norm layers as in Vaswani et al. 2017, under a causal mask."""

    def __init__(self, dropout):
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.position = lk.nn.SinusoidalPositionalEncoding(WIDTH, LENGTH, dropout)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, BYTES)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens):
        x = self.position(self.embedding(tokens) * WIDTH**0.5)
        return self.head(self.layers(x, self.mask, is_causal=True))

    def loss(self, window, generator):
        logits = self(window[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


class MaskedModel(nn.Module):
    """BERT on masked bytes: 15 % of them, all replaced."""

    def __init__(self, dropout):
        super().__init__()
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=BYTES + 1,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=HIDDEN,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.bert = BertForMaskedLM(config)

    def loss(self, window, generator):
        tokens = window[:, 1:]
        hidden = torch.rand(tokens.shape, generator=generator) < 0.15
        logits = self.bert(input_ids=tokens.masked_fill(hidden, MASK)).logits
        return F.cross_entropy(logits[hidden], tokens[hidden])


def train(make, data, steps, dropout, seed, swap, nudge) -> list[float]:
    """Return the loss of each step. Data and initial weights depend on the seed alone."""
    torch.manual_seed(seed)
    model = make(dropout).train()
    if swap:
        report = lk.optimize(model)
        assert report.swapped, report
    if nudge:
        weight = max(model.parameters(), key=torch.numel).detach().view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    torch.manual_seed(seed + 1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(1, (step + 1) / 50)
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=generator)
        window = torch.stack([data[s : s + LENGTH + 1] for s in starts])
        loss = model.loss(window, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def smooth(losses, width=20):
    """Return the mean of each step and those before it."""
    return [
        sum(part) / len(part)
        for i in range(len(losses))
        if (part := losses[max(0, i + 1 - width) : i + 1])
    ]


def apart(a, b) -> float:
    """Return the largest distance of two curves."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def summary(curves) -> dict[str, float]:
    """Return the figures that documentation quotes of one model's curves."""
    smoothed = {k: smooth(v) for k, v in curves.items()}
    return {
        "swapped to stock, smoothed": apart(smoothed["swapped"], smoothed["stock"]),
        "two seeds of stock, smoothed": apart(smoothed["stock, another seed"], smoothed["stock"]),
        "no dropout, first 50 steps": apart(
            curves["swapped, no dropout"][:50], curves["stock, no dropout"][:50]
        ),
        "no dropout, all steps": apart(curves["swapped, no dropout"], curves["stock, no dropout"]),
        "one ulp apart, first 50 steps": apart(
            curves["one ulp apart, no dropout"][:50], curves["stock, no dropout"][:50]
        ),
        "one ulp apart, all steps": apart(
            curves["one ulp apart, no dropout"], curves["stock, no dropout"]
        ),
        "last loss of stock": smoothed["stock"][-1],
        "last loss of swapped": smoothed["swapped"][-1],
    }


def plot(results, path) -> None:
    """Plot both models: the curves with dropout, and the distance of those without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(results), figsize=(11, 7), squeeze=False)
    for i, (name, curves) in enumerate(results.items()):
        above, below = axes[0][i], axes[1][i]
        for run, style in (("stock", "-"), ("stock, another seed", ":"), ("swapped", "--")):
            above.plot(smooth(curves[run]), style, label=run)
        above.set(title=f"{name}, dropout 0.1", ylabel="loss (mean of 20 steps)")
        above.legend()
        for run in ("swapped", "one ulp apart"):
            pairs = zip(curves[f"{run}, no dropout"], curves["stock, no dropout"], strict=True)
            below.semilogy([max(abs(a - b), 1e-8) for a, b in pairs], lw=0.8, label=run)
        below.set(title="no dropout", xlabel="step", ylabel="distance of the loss to stock's")
        below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    folder = Path(__file__).resolve().parents[1] / "build" / "results" / "training"
    parser.add_argument("--out", type=Path, default=folder)
    options = parser.parse_args()
    data, results = text(), {}
    print(f"{len(data)} bytes of docstrings, {options.steps} steps")
    for name, make in (("causal model", CausalModel), ("BERT", MaskedModel)):
        results[name] = {}
        for run, settings in RUNS.items():
            start = time.perf_counter()
            losses = train(make, data, options.steps, *settings)
            results[name][run] = [round(v, 7) for v in losses]
            seconds = time.perf_counter() - start
            print(f"{name:13} {run:20} {losses[0]:.3f} -> {losses[-1]:.3f}, {seconds:.0f} s")
    options.out.mkdir(parents=True, exist_ok=True)
    summaries = {name: summary(curves) for name, curves in results.items()}
    about = {"torch": torch.__version__, "steps": options.steps, "summary": summaries}
    (options.out / "curves.json").write_text(json.dumps({**about, "losses": results}) + "\n")
    plot(results, options.out / "curves.png")
    print(json.dumps(summaries, indent=1))


if __name__ == "__main__":
    main()
