"""What the stress tests share: the device, and a seed for each test."""

import pytest
import torch

from llmos_kernels.testing import CASES

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
CASE = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    if GPU:
        torch.cuda.empty_cache()
