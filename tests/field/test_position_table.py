"""The table of positions is exact after any change of the module's dtype or device."""

import copy
import io
import pickle

import pytest
import torch

from llmos_kernels.nn import SinusoidalPositionalEncoding

X = torch.randn(2, 9, 12)


@pytest.fixture
def expected():
    return SinusoidalPositionalEncoding(12)(X, offset=4)


def on_meta(module):
    with torch.device("meta"):
        made = SinusoidalPositionalEncoding(12)
    return made.to_empty(device="cpu")


CHANGES = {
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "meta": lambda m: m.to("meta").to_empty(device="cpu"),
    "made on meta": on_meta,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_changes(name, used, expected):
    module = SinusoidalPositionalEncoding(12)
    if used:
        module(X)
    module = CHANGES[name](module)
    assert torch.equal(module(X, offset=4), expected)
    assert not module.state_dict() and not list(module.buffers())


def test_graphs(expected):
    module = SinusoidalPositionalEncoding(12)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, 4), expected)
    assert module._table is None
    length = torch.export.Dim("length", min=2, max=4000)
    program = torch.export.export(
        SinusoidalPositionalEncoding(12), (X,), dynamic_shapes=({1: length},), strict=False
    )
    long = torch.randn(2, 300, 12)
    torch.testing.assert_close(program.module()(long), module(long))
    file = io.BytesIO()
    torch.save(module, file)
    assert file.tell() < 20_000  # The table is left out.
