"""Modules are drop-in replacements: signature, state dict, classes and results of torch.nn."""

import copy
import inspect
import math
import pickle

import pytest
import torch

from llmos_kernels import nn

MODULES = [
    (nn.LayerNorm, torch.nn.LayerNorm, {}),
    (nn.LayerNorm, torch.nn.LayerNorm, {"eps": 1e-12, "bias": False}),
    (nn.LayerNorm, torch.nn.LayerNorm, {"elementwise_affine": False}),
    (nn.RMSNorm, torch.nn.RMSNorm, {}),
    (nn.RMSNorm, torch.nn.RMSNorm, {"eps": 1e-3, "elementwise_affine": False}),
]


@pytest.mark.parametrize("shape", [64, (5, 8)], ids=str)
@pytest.mark.parametrize("ours, theirs, options", MODULES)
def test_drop_in(ours, theirs, options, shape, device):
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert issubclass(ours, theirs)
    a, b = ours(shape, **options).to(device), theirs(shape, **options).to(device)
    for p in b.parameters():
        torch.nn.init.normal_(p)
    a.load_state_dict(b.state_dict())
    assert repr(a) == repr(b)
    x = torch.randn(3, 5, 8, device=device) if shape != 64 else torch.randn(3, 64, device=device)
    torch.testing.assert_close(a(x), b(x))
    for again in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert torch.equal(again(x), a(x))


@pytest.mark.parametrize("training", [False, True])
def test_add_layer_norm(training, device):
    module = nn.AddLayerNorm(64, dropout=0.5, device=device).train(training)
    x, residual = torch.randn(2, 4096, 64, device=device)
    y, h = module(x, residual)
    dropped = h == residual
    assert abs(dropped.float().mean().item() - (0.5 if training else 0)) < 0.01
    scale = 2 if training else 1
    torch.testing.assert_close(h, torch.where(dropped, residual, residual + x * scale))
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(h, (64,)))
    assert set(module.state_dict()) == {"weight", "bias"}
    assert "dropout=0.5" in repr(module)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2, float("nan")])
def test_dropout_out_of_range(p):
    with pytest.raises(ValueError, match=str(p)):
        nn.AddLayerNorm(8, dropout=p)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_rms_norm_takes_a_weight_of_any_dtype(device):
    x = torch.randn(4, 64, device=device)
    for input, dtype in (
        (x, torch.bfloat16),
        (x.double(), torch.float32),
        (x.half(), torch.bfloat16),
    ):
        ours = nn.RMSNorm(64, device=device, dtype=dtype)
        theirs = torch.nn.RMSNorm(64, device=device, dtype=dtype)
        y = ours(input)
        torch.testing.assert_close(y, theirs(input))
        y.sum().backward()
        assert ours.weight.grad.dtype == dtype


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(device):
    parts = [torch.randn(n, 16, device=device) for n in (3, 5)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert torch.equal(
        nn.LayerNorm(16, device=device)(x).values(),
        torch.nn.LayerNorm(16, device=device)(x).values(),
    )


def test_training_step_matches_torch(device):
    def train(norm):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 32), norm(32), torch.nn.Linear(32, 1))
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x, y = torch.randn(64, 32, device=device), torch.randn(64, 1, device=device)
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        return loss

    torch.testing.assert_close(train(nn.LayerNorm), train(torch.nn.LayerNorm), rtol=1e-3, atol=1e-5)


def test_sinusoidal_positions():
    encoding = nn.SinusoidalPositionalEncoding(7, max_len=50)
    x = torch.randn(2, 11, 7)
    added = encoding(x) - x
    for t in (0, 1, 10):
        for i in range(7):
            angle = t / 10000 ** (i // 2 * 2 / 7)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert abs(added[1, t, i].item() - expected) < 1e-6
    torch.testing.assert_close(encoding(x[:, 4:], offset=4), encoding(x)[:, 4:])
    torch.testing.assert_close(encoding(x[0]), encoding(x)[0])
    rows_first = nn.SinusoidalPositionalEncoding(7, max_len=50, batch_first=False)
    torch.testing.assert_close(rows_first(x.transpose(0, 1)).transpose(0, 1), encoding(x))
    assert not encoding.state_dict() and encoding(x.bfloat16()).dtype == torch.bfloat16
    dropped = nn.SinusoidalPositionalEncoding(7, dropout=0.5)
    assert (dropped(x) == 0).any() and not (dropped.eval()(x) == 0).any()
    for call in (lambda: encoding(torch.randn(2, 51, 7)), lambda: encoding(x, offset=-1)):
        with pytest.raises(ValueError, match="max_len=50"):
            call()
    with pytest.raises(ValueError, match=r"\[2, 3, 8\]"):
        encoding(torch.randn(2, 3, 8))
    for bad in ((0,), (8, 0), (8, 10, 1.0)):
        with pytest.raises(ValueError):
            nn.SinusoidalPositionalEncoding(*bad)
