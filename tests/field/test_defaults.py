"""What is found and proved does not depend on torch's default dtype and device."""

import copy

import pytest
import torch
from torch import nn

import llmos_kernels as lk

D = 16


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), 1e-6

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(D, D), nn.Dropout(0.1), nn.LayerNorm(D)

    def forward(self, x, residual):
        return self.norm(self.dropout(self.dense(x)) + residual)


def model():
    return nn.ModuleList(
        (
            RMSNorm(),
            Residual(),
            nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D)),
            nn.TransformerEncoderLayer(D, 2, 32, batch_first=True),
            nn.MultiheadAttention(D, 2),
            nn.RMSNorm(D),
        )
    )


def swapped(made):
    report = lk.optimize(made, always=True)
    return [(e.module, e.swapped, e.reason) for e in report.entries]


@pytest.fixture
def wanted():
    return swapped(model())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_default_dtype(dtype, wanted):
    made = model()
    torch.set_default_dtype(dtype)
    try:
        assert swapped(made) == wanted
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_device(wanted):
    made = model()
    other = copy.deepcopy(made)
    with torch.device("meta"):
        assert swapped(made) == wanted
        lk.quantize(other, always=True)
