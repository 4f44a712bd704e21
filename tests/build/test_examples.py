"""Every example in a docstring runs, and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import llmos_kernels
from llmos_kernels import quantize, save_quantized

#: Modules whose examples name a saved model or a rule of the reader's.
READERS_OWN = {
    "llmos_kernels.integrations.transformers",
    "llmos_kernels.integrations.transformers.int8",
    "llmos_kernels.swap.rules",
    "llmos_kernels.swap.rules.rule",
}
PUBLIC = {name: getattr(llmos_kernels, name) for name in llmos_kernels.__all__}
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(llmos_kernels.__path__, "llmos_kernels.")
    if not name.startswith(("llmos_kernels._triton", "llmos_kernels._C", "llmos_kernels._ops"))
    and name not in {"llmos_kernels.__main__", *READERS_OWN}
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # One saves a model in "folder".
    torch.manual_seed(0)
    module = importlib.import_module(name)
    model, fresh_model = (nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2))
    quantize(model, always=True)
    save_quantized(model, "folder")
    names = PUBLIC | {
        "torch": torch,
        "nn": nn,
        "llmos_kernels": llmos_kernels,
        "model": model,
        "fresh_model": fresh_model,
    }
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    missing = {key: value for key, value in names.items() if key not in vars(module)}
    assert doctest.testmod(module, extraglobs=missing, optionflags=flags).failed == 0
