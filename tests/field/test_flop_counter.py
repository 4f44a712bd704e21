"""torch's FLOP counter counts for our ops what it counts for the modules that they replace.

After pytorch/pytorch #195460 and NATTEN #184: an op without a formula counts 0 in silence.
"""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import llmos_kernels as lk


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def forward(model, given):
    return lambda: model(**given)


def step(model, given):
    def run():
        out = model(**given)
        (out[0] if isinstance(out, tuple) else getattr(out, "logits", out)).sum().backward()

    return run


@pytest.mark.parametrize("run", [forward, step])
def test_bert(run):
    models = pytest.importorskip("transformers.models")
    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    config = models.bert.BertConfig(**sizes, num_attention_heads=4)
    stock = models.bert.BertForMaskedLM(config)
    stock.set_attn_implementation("eager")
    model = copy.deepcopy(stock)
    assert lk.optimize(model, always=True).swapped
    given = {"input_ids": torch.randint(99, (4, 32))}
    assert flops(run(model, given)) == flops(run(stock, given)) > 0


@pytest.mark.parametrize("run", [forward, step])
@pytest.mark.parametrize("rows", [1, 64])
def test_feed_forward(run, rows):
    stock = nn.Sequential(nn.Linear(96, 192), nn.ReLU(), nn.Linear(192, 96))
    model = copy.deepcopy(stock)
    lk.optimize(model, always=True)
    given = {"input": torch.randn(rows, 96, requires_grad=True)}
    assert flops(run(model, given)) == flops(run(stock, given)) > 0


def test_attention():
    q, k, v = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 16)
    wanted = 2 * 2 * 4 * 10 * 30 * (8 + 16)
    assert flops(lambda: lk.scaled_dot_product_attention(q, k, v, enable_gqa=True)) == wanted
    # Two sequences, of 3 and 7 queries and of 10 and 5 keys.
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ((0, 3, 10), (0, 10, 15)))
    q, k = torch.randn(10, 4, 8), torch.randn(15, 4, 8)
    varlen = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    wanted = 2 * 4 * (3 * 10 + 7 * 5) * (8 + 8)
    assert flops(lambda: lk.scaled_dot_product_attention(q, k, k, **varlen)) == wanted
    q, k = torch.randn(2, 4, 10, 8), torch.randn(2, 4, 30, 8)
    wanted = 2 * 2 * 4 * 10 * 30 * (8 + 8 + 8)  # The weights are computed once more.
    assert flops(lambda: lk.scaled_dot_product_attention(q, k, k, return_weights="mean")) == wanted


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_int8(mode, rows):
    w, scale = lk.int8_quantize(torch.randn(48, 32))
    x = torch.randn(rows, 32)
    assert flops(lambda: lk.int8_linear(x, w, scale, mode=mode)) == 2 * rows * 32 * 48


def test_the_counter_is_not_imported():
    """Our formulas enter its registry when a program imports it, before or after ours."""
    code = """
import sys, torch
{first}
import llmos_kernels as lk
{check}
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(64, 96)
with FlopCounterMode(display=False) as counter:
    lk.linear(x, torch.randn(96, 96))
assert counter.get_total_flops() == 2 * 64 * 96 * 96
assert not any("llmos" in type(finder).__module__ for finder in sys.meta_path)
"""
    for first, check in (
        ("", "assert 'torch.utils.flop_counter' not in sys.modules"),
        ("import torch.utils.flop_counter", ""),
    ):
        subprocess.run([sys.executable, "-c", code.format(first=first, check=check)], check=True)
