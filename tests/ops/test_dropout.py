"""The dropout mask: Philox test vectors, statistics, independence, replay."""

import pytest
import torch

import llmos_kernels as lk
from llmos_kernels.ops._dropout import draw_seed, keep_mask, philox

# The test vectors of Random123 for Philox4x32-7: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "4dfccaba 190a87f0 c47362ba b6b5242a",
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_known_answers(counter, key, expected):
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert " ".join(f"{int(w):08x}" for w in words) == expected


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_statistics(p):
    torch.manual_seed(0)
    kept = keep_mask(draw_seed(torch.device("cpu")), 1000, 1000, p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 4 * sigma / 1000
    assert (kept.mean(0) - (1 - p)).abs().max() < 7 * sigma / 1000**0.5
    assert (kept.mean(1) - (1 - p)).abs().max() < 7 * sigma / 1000**0.5
    for shift in (1, 2, 3, 4):  # Neighbours in a row; four of them come from one Philox counter.
        centred = kept - (1 - p)
        correlation = (centred[:, shift:] * centred[:, :-shift]).mean() / sigma**2
        assert abs(correlation) < 5 / 1000


def test_masks_differ_between_seeds_and_offsets():
    seeds = [torch.tensor(s) for s in ([1, 0], [2, 0], [1, 1], [1 + 2**32, 0])]
    masks = [keep_mask(s, 64, 64, 0.5) for s in seeds]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.4 < (a == b).double().mean() < 0.6


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_out_of_range(p):
    x = torch.ones(2, 8)
    for op in (lk.add_layer_norm, lk.add_rms_norm):
        with pytest.raises(ValueError, match=str(p)):
            op(x, x, (8,), dropout_p=p)


def test_only_in_training(device):
    x = torch.ones(4, 64, device=device)
    _, h = lk.add_layer_norm(x, torch.zeros_like(x), (64,), dropout_p=0.5)
    assert torch.equal(h, x)


def test_replay_in_a_checkpoint(device):
    """Activation checkpointing recomputes the forward pass with the same mask."""
    x = torch.randn(16, 64, device=device, requires_grad=True)

    def block(x):
        return lk.add_layer_norm(x, x, (64,), dropout_p=0.3, training=True)[0].square()

    torch.manual_seed(3)
    direct = torch.autograd.grad(block(x).sum(), x)[0]
    torch.manual_seed(3)
    again = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], direct)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_draws_new_masks():
    x, zero = torch.ones(64, 256, device="cuda"), torch.zeros(64, 256, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, h = lk.add_layer_norm(x, zero, (256,), dropout_p=0.5, training=True)
    graph.replay()
    first = h.clone()
    graph.replay()
    assert not torch.equal(h, first)
