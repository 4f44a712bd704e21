"""Swap small models of all text families of transformers: what is fused, and whether it is right.

    python tests/families.py [FAMILY ...] [--out FILE]

A family is made with the sizes below and random weights; one that cannot be made so is listed as
such. Parts are counted by what torch still computes (``helpers/stock_parts.py``). Outputs and
gradients without dropout are compared with those of the stock model. It takes some minutes.
"""

import argparse
import copy
import json
import sys
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import torch
import transformers
from stock_parts import stock_parts
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import llmos_kernels as lk
from llmos_kernels.swap import timing

#: The names that families have for their sizes.
SIZES = {
    32: ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size"),
    64: ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
    + ("decoder_layers", "num_decoder_layers"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
    + ("decoder_attention_heads", "num_key_value_heads"),
    8: ("d_kv", "head_dim", "d_head"),
    100: ("vocab_size",),
    128: ("max_position_embeddings", "n_positions"),
}
LENGTH, LARGEST = 12, 20_000_000


def small(family: str) -> nn.Module:
    """Return a model of ``family`` in eval mode, without dropout in train mode."""
    default = AutoConfig.for_model(family).to_dict()
    given = {name: n for n, names in SIZES.items() for name in names if name in default}
    given |= {k: 0.0 for k, v in default.items() if "dropout" in k and isinstance(v, float)}
    given |= {k: 0.0 for k in ("resid_pdrop", "embd_pdrop", "attn_pdrop") if k in default}
    given |= {k: 1 for k in ("pad_token_id", "bos_token_id", "eos_token_id") if k in default}
    config = AutoConfig.for_model(family, **given)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"it has {parameters} parameters for all that")
    return AutoModel.from_config(config).eval()


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return tokens of two sentences of which one is padded."""
    given = {
        "input_ids": torch.randint(5, 95, (2, LENGTH)),
        "attention_mask": torch.ones(2, LENGTH, dtype=torch.int64),
    }
    given["attention_mask"][0, 8:] = 0
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = torch.randint(5, 95, (2, 7))
    return given


def result(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the last states of the tokens that are no padding."""
    out = model(**given)[0]
    return out[given["attention_mask"].bool()] if out.shape[1] == LENGTH else out


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-20)).item()


def gradients(model: nn.Module, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradients of all parameters for one loss."""
    model.train().zero_grad()
    torch.manual_seed(3)
    out = result(model, given)
    (out * torch.randn_like(out)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.eval().zero_grad()
    return found


def judge(family: str) -> dict:
    """Return what became of one family."""
    torch.manual_seed(0)
    try:
        model = small(family)
        given = inputs(model)
        with torch.no_grad():
            result(model, given)
        stock = copy.deepcopy(model)
        before = stock_parts(stock, kwargs=given)
        gradients(stock, given)
    except Exception as e:  # The family takes other sizes or inputs.
        return {"family": family, "not made": f"{type(e).__name__}: {str(e)[:80]}"}
    if not before["attention"]:
        return {"family": family, "not made": "it has no attention"}
    try:
        report = lk.optimize(model, inputs=given, always=True)
        after = stock_parts(model, kwargs=given)
        with torch.no_grad():
            values = error(result(model, given), result(stock, given))
        ours, theirs = gradients(model, given), gradients(stock, given)
        norm = torch.stack([g.norm() for g in theirs.values()]).max().item()
        slopes = max((ours[n] - g).norm().item() / norm for n, g in theirs.items())
        assert ours.keys() == theirs.keys(), "other parameters have gradients"
    except Exception:
        return {"family": family, "crash": traceback.format_exc()}
    kept = {f"{e.cls}: {e.reason}" for e in report.kept}
    return {
        "family": family,
        "before": before,
        "after": after,
        "values": values,
        "gradients": slopes,
        "kept": sorted(kept),
    }


def main(families: list[str], out: Path | None) -> int:
    """Print a line for each family, then the sums; return 1 if a result was wrong."""
    timing.of_module = lambda *_, **__: []
    timing.of_model = lambda *_, **__: ([], {})
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    made, total, left, wrong = 0, dict[str, int](), dict[str, int](), []
    for family in families or sorted(MODEL_MAPPING_NAMES):
        found = judge(family)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(found) + "\n")
        if "not made" in found:
            print(f"{family:28} not made: {found['not made']}", flush=True)
            continue
        made += 1
        if "crash" in found or not max(found["values"], found["gradients"]) < 1e-4:
            wrong.append(family)
        if "crash" in found:
            print(f"{family:28} CRASH\n{found['crash']}", flush=True)
            continue
        fused = [f"{k} {n - found['after'][k]}/{n}" for k, n in found["before"].items()]
        errors = f"values {found['values']:.1e}, gradients {found['gradients']:.1e}"
        print(f"{family:28} {', '.join(fused)}; {errors}", flush=True)
        for kind, n in found["before"].items():
            total[kind] = total.get(kind, 0) + n
            left[kind] = left.get(kind, 0) + found["after"][kind]
    shares = ", ".join(f"{k} {1 - left[k] / n:.1%} of {n}" for k, n in total.items() if n)
    print(f"{made} families; fused: {shares}; wrong: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    given = parser.parse_args()
    sys.exit(main(given.families, given.out))
