"""Stress tests: tensors that do not fit in memory, and those of more than 2^31 elements."""

import pytest
import torch
from stress import CASE, DEVICE, GPU, needs_gpu, seeded  # noqa: F401  a fixture of every test

import llmos_kernels as lk
from llmos_kernels.testing import (
    assert_accurate,
    cast,
    run,
    run_with_gradients,
    tensors,
)

#: More than any address space: the allocation fails at once, even if the system overcommits memory.
HUGE = 2**48


def _rows(n, d):
    """Return a view of one row, expanded to ``n`` rows."""
    return torch.randn(1, d, device=DEVICE).expand(n, d)


def _quantized(n):
    weight, scale = lk.int8_quantize(torch.randn(40, 64, device=DEVICE))
    return lk.int8_linear(_rows(n, 64), weight, scale)


def _attention(n, **options):
    q, k, v = torch.randn(3, 2, 2, 1, 16, device=DEVICE)
    return lk.scaled_dot_product_attention(q.expand(2, 2, n, 16), k, v, **options)


def _feed_forward(n):
    weight = torch.randn(40, 64, device=DEVICE)
    return lk.feed_forward(_rows(n, 64), weight, None, weight.mT, None, "gelu")


def _embedding(n):
    index = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE).expand(n, 3)
    return lk.embedding_layer_norm([index], [torch.randn(5, 64, device=DEVICE)])


TOO_LARGE = {
    "layer_norm": lambda n: lk.layer_norm(_rows(n, 64), (64,)),
    "rms_norm": lambda n: lk.rms_norm(_rows(n, 64), (64,)),
    "add_layer_norm": lambda n: lk.add_layer_norm(_rows(n, 64), _rows(n, 64), (64,))[0],
    "linear": lambda n: lk.linear(_rows(n, 64), torch.randn(40, 64, device=DEVICE)),
    "feed_forward": _feed_forward,
    "attention": _attention,
    "attention-causal": lambda n: _attention(n, is_causal=True),
    "embedding": _embedding,
    "int8_quantize": lambda n: lk.int8_quantize(_rows(n, 64))[0],
    "int8_linear": _quantized,
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_out_of_memory(name):
    """torch's error is raised, and later results are right.

    On a CPU the error is a plain RuntimeError: the stable ABI does not pass on its message.
    """

    def result():
        torch.manual_seed(0)
        return TOO_LARGE[name](5)

    before = result()
    kind, words = torch.OutOfMemoryError if GPU else RuntimeError, "memory|new_empty|empty_strided"
    with pytest.raises(kind, match=words):
        TOO_LARGE[name](HUGE)
    assert torch.equal(result(), before)


@needs_gpu
def test_out_of_memory_beside_real_tensors():
    torch.cuda.empty_cache()
    rows = int(torch.cuda.mem_get_info()[0] * 0.6) // 2048
    x = torch.empty(rows, 1024, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        lk.layer_norm(x, (1024,))
    del x
    x = torch.randn(5, 1024, device="cuda")
    assert torch.equal(lk.layer_norm(x, (1024,)), lk.layer_norm(x[None], (1024,))[0])


#: Elements of the largest tensor; the last rows are judged, enough of them not to judge luck.
ELEMENTS, LAST = (2**31 if GPU else 2**14), 16
#: The shape without the batch, and how many elements of the largest tensor belong to one of it.
LARGE = {
    "layer_norm": ((1024,), 1024),
    "add_layer_norm": ((1024,), 1024),
    "rms_norm": ((32768,), 32768),
    "linear-relu": ((64, 2112), 2112),
    "feed_forward-gelu": ((64, 2112), 2112),
    "attention": ((16, 64, 64, 128), 16 * 64 * 128),
    "attention-causal": ((16, 64, 64, 128), 16 * 64 * 128),
    "embedding": ((8, 1024), 8 * 1024),
}


def _last(n, values):
    """Return ``values`` with tensors of ``n`` rows replaced by their last rows, as new leaves."""
    has_all_rows = lambda a: isinstance(a, torch.Tensor) and a.shape[:1] == (n,)
    return [
        a[-LAST:].detach().clone().requires_grad_(a.requires_grad) if has_all_rows(a) else a
        for a in values
    ]


@pytest.mark.parametrize("name", LARGE)
def test_past_two_to_the_31_elements(name):
    """The last rows and their gradients are as accurate as if there were no others."""
    shape, each = LARGE[name]
    n, case = ELEMENTS // each + 5, CASE[name]
    args = case.make((n, *shape), dtype=torch.bfloat16, device=DEVICE)
    for a in tensors(args):
        if a.shape[0] == n and a.is_floating_point():
            a.requires_grad_()
    with torch.no_grad():
        gradients = [torch.randn_like(o) for o in run(case.op, args)]
    results = [*run(case.op, args)]
    leaves = [a for a in tensors(args) if a.requires_grad]
    if leaves:
        results += torch.autograd.grad(results, leaves, gradients)
    actual = [t.detach()[-LAST:].clone() for t in results]
    last_inputs = _last(n, args), _last(n, gradients)
    del results, args, leaves, gradients
    for i, values in enumerate(zip(actual, *_expected(case, *last_inputs), strict=True)):
        assert_accurate(*values, f"{name}, {i}")


def _expected(case, args, gradients):
    """Yield the results of the reference in float64, and of torch."""
    wide = cast(args, torch.float64), [g.double() for g in gradients]
    for fn, given, incoming in ((case.reference, *wide), (case.eager, args, gradients)):
        if any(a.requires_grad for a in tensors(given)):
            yield [*run_with_gradients(fn, given, incoming).values()]
        else:
            yield [*run(fn, given)]


def test_int8_past_two_to_the_31_elements():
    """The integers of a row, and the bits of its result, do not depend on its batch."""
    x = torch.randn(ELEMENTS // 1024 + 5, 1024, dtype=torch.bfloat16, device=DEVICE)
    for all_rows, last in zip(lk.int8_quantize(x), lk.int8_quantize(x[-3:]), strict=True):
        assert torch.equal(all_rows[-3:], last)
    del x
    x = torch.randn(ELEMENTS // 2112 + 5, 64, dtype=torch.bfloat16, device=DEVICE)
    weight, scale = lk.int8_quantize(torch.randn(2112, 64, device=DEVICE))
    for activation in (None, "gelu"):
        last = lk.int8_linear(x[-3:], weight, scale, activation=activation)
        assert torch.equal(lk.int8_linear(x, weight, scale, activation=activation)[-3:], last)
