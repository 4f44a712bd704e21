"""``optimize`` on Transformers after the public structure of code that nobody here wrote."""

import copy

import handwritten_models
import pytest
import torch
from public_structures import STRUCTURES
from stock_parts import stock_parts

import llmos_kernels as lk

pytestmark = pytest.mark.usefixtures("untimed")


@pytest.mark.parametrize("make", STRUCTURES, ids=lambda f: f.__name__)
def test_structure(make):
    """The parts that run in torch before and after, and that outputs and gradients are the same."""
    torch.manual_seed(0)
    model, args = make()
    fused = copy.deepcopy(model)
    report = lk.optimize(fused, inputs=args, always=True)
    before, after = STRUCTURES[make]
    assert tuple(stock_parts(model, args).values()) == before
    assert tuple(stock_parts(fused, args).values()) == after, report.details()
    with torch.no_grad():
        torch.testing.assert_close(fused(*args), model(*args), rtol=1e-4, atol=1e-5)

    def fuse(model):
        lk.optimize(model, inputs=args, always=True)
        return model

    torch.manual_seed(0)
    handwritten_models.check_gradients(model, fuse, args, stock=make()[0])
