"""Compare attention with torch; shared by the tests of attention."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmos_kernels import scaled_dot_product_attention as attention
from llmos_kernels import testing
from llmos_kernels.testing import assert_accurate


def make(q_len, k_len, dtype=torch.float32, batch=2, heads=4, kv_heads=4, dim=24, device="cpu"):
    """Return random query, key and value [batch, heads, length, dim] with transposed strides."""
    generator = testing.generator(q_len * 1000 + k_len)
    return [
        torch.randn(batch, length, n, dim, generator=generator).to(device, dtype).transpose(1, 2)
        for length, n in ((q_len, heads), (k_len, kv_heads), (k_len, kv_heads))
    ]


def explicit(q, k, v, mask=None, enable_gqa=False):
    """Return attention by matrix products and softmax; rows that see no key are 0."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        logits = logits + mask
    return logits.softmax(-1).nan_to_num(0.0) @ v


def outputs_and_gradients(fn, args, dtype=None, **options):
    """Return the output and the gradients of the float arguments, all computed in ``dtype``."""
    args = [
        a.detach().to(dtype or a.dtype, copy=True).requires_grad_()
        if a is not None and a.is_floating_point()
        else a
        for a in args
    ]
    out = fn(*args, **options)
    generator = testing.generator(7)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    leaves = [a for a in args if a is not None and a.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.device, out.dtype))]


def compare(*results):
    """Assert the error budget of each output over all ``results``: (ours, float64, torch's)."""
    for i, columns in enumerate(zip(*(zip(*r, strict=True) for r in results), strict=True)):
        a, exact, e = (torch.cat([t.flatten() for t in ts]) for ts in zip(*columns, strict=True))
        if exact.abs().max() < 1e-12:  # With one visible key the gradient is 0 but for rounding.
            assert a.abs().max() <= 64 * torch.finfo(a.dtype).eps
        else:
            assert_accurate(a, exact, e, f"result {i}")


def worse(exact, *eagers):
    """Return for each result the one of torch's two computations with the larger error."""
    return [
        max(ways, key=lambda t, e=e: (t - e).abs().max())
        for e, *ways in zip(exact, *eagers, strict=True)
    ]


def math(*args, **options):
    """Return torch's SDPA by its math kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **options)


def results(args, mask=None, exact=explicit, **options):
    """Return our results with ``options``; ``exact``'s in float64 and torch's with ``mask``.

    ``mask`` is the merged mask that ``options`` amount to.
    """
    gqa = {"enable_gqa": True} if options.get("enable_gqa") else {}
    actual = outputs_and_gradients(attention, args, **options)
    merged = args if mask is None else [*args[:3], mask]
    right = outputs_and_gradients(exact, merged, torch.float64, **gqa)
    eagers = (outputs_and_gradients(fn, merged, **gqa) for fn in (explicit, exact))
    return actual, right, worse(right, *eagers)


def check(args, mask=None, exact=explicit, **options):
    """Assert the error budget of ``results`` and return ours."""
    found = results(args, mask, exact, **options)
    compare(found)
    return found[0]
