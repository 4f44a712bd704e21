"""Measure how often the proof of ``optimize`` wrongly refuses a correct swap.

    python tests/false_alarms.py [--seeds 1000] [--kinds NAME ...] [--dtypes NAME ...] [--out FILE]

A seed determines the weights of a small module and the inputs of its proof. Results are appended to
FILE, by ISA (the values of LLMOS_CPU_LEVEL), kind, dtype and seed; a run continues where an earlier
one stopped.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import torch
from swap_models import Block
from torch import nn
from transformers import PreTrainedModel
from transformers import models as hf
from transformers.pytorch_utils import Conv1D

from llmos_kernels import _C
from llmos_kernels.integrations.transformers import attention_rule
from llmos_kernels.swap import rules

D, HEADS, INNER = 32, 4, 48


def layer(cls: type, norm_first: bool) -> nn.Module:
    """Return a small Transformer layer without dropout."""
    return cls(D, HEADS, INNER, dropout=0.0, batch_first=True, norm_first=norm_first)


def llama_norm() -> nn.Module:
    """Return an RMS norm of a Hugging Face model, a class that no rule knows by name."""
    return hf.llama.modeling_llama.LlamaRMSNorm(D)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(D),
    "RMSNorm": lambda: nn.RMSNorm(D),
    "a model's RMS norm": llama_norm,
    "Linear": lambda: nn.Linear(D, INNER),
    "Conv1D": lambda: Conv1D(INNER, D),
    "linear and activation": lambda: nn.Sequential(nn.Linear(D, INNER), nn.GELU()),
    "residual block": lambda: Block(D),
    "feed-forward block": lambda: nn.Sequential(
        nn.Linear(D, INNER), nn.ReLU(), nn.Dropout(0.1), nn.Linear(INNER, D)
    ),
    "MultiheadAttention": lambda: nn.MultiheadAttention(D, HEADS, batch_first=True),
    "EncoderLayer, post-norm": lambda: layer(nn.TransformerEncoderLayer, False),
    "EncoderLayer, pre-norm": lambda: layer(nn.TransformerEncoderLayer, True),
    "DecoderLayer, post-norm": lambda: layer(nn.TransformerDecoderLayer, False),
    "DecoderLayer, pre-norm": lambda: layer(nn.TransformerDecoderLayer, True),
    "attention of BertModel": lambda: hf.bert.BertModel(
        hf.bert.BertConfig(
            hidden_size=D,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            vocab_size=50,
            intermediate_size=INNER,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).eval(),
}


def error_of(kind: str, dtype: torch.dtype, seed: int) -> float:
    """Return the error over budget that the proof finds for one random module."""
    torch.manual_seed(seed)
    module = KINDS[kind]()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    module.to(dtype)
    if isinstance(module, PreTrainedModel):
        return attention_rule.largest_error(module, attention_rule.example_calls(module))
    candidate = rules.classify(module)
    assert candidate is not None
    return max(candidate.largest_error(call) for call in candidate.example_calls())


def main() -> int:
    """Run what FILE lacks and print a line for each kind; return 1 if over 0.1 % are refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--out", type=Path, default=Path("build/false_alarms.jsonl"))
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    level = _C.cpu_level()
    torch.set_num_threads(1)
    # On an AVX2 machine torch does not use oneDNN for bfloat16 products.
    torch.backends.mkldnn.set_flags(os.environ.get("ONEDNN_MAX_CPU_ISA") != "AVX2")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[tuple, dict[int, float]] = {}
    if args.out.exists():
        for line in args.out.read_text().splitlines():
            *key, seed, error = json.loads(line)
            found.setdefault(tuple(key), {})[seed] = error
    worst = 0.0
    with args.out.open("a") as out:
        for kind in args.kinds:
            for dtype in args.dtypes:
                known, start = found.setdefault((level, kind, dtype), {}), time.perf_counter()
                for seed in range(args.seeds):
                    if seed not in known:
                        known[seed] = error_of(kind, getattr(torch, dtype), seed)
                        print(json.dumps([level, kind, dtype, seed, known[seed]]), file=out)
                out.flush()
                alarms = sum(not known[s] <= 1 for s in range(args.seeds))
                worst = max(worst, alarms / args.seeds)
                taken = time.perf_counter() - start
                result = (
                    f"{alarms:4} of {args.seeds} refused, largest error {max(known.values()):.3f}"
                )
                print(f"{level:12} {kind:25} {dtype:9} {result} ({taken:.0f} s)", flush=True)
    return 1 if worst > 1e-3 else 0


if __name__ == "__main__":
    sys.exit(main())
