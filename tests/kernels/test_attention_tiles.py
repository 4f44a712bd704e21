"""Triton attention kernels with the tiles of other GPUs, and with every kind of bool mask."""

import pytest
import torch

from llmos_kernels._core.registry import DEFINED
from llmos_kernels.testing import CASES, assert_accurate, cast, raw_calls, run

pytest.importorskip("triton")


def assert_attention_accurate(op, given):
    """Assert the error budget of a Triton launcher; outputs that are None or empty are skipped."""
    defined = DEFINED[op]
    exact = run(defined.reference, cast(given, torch.float64))
    results = run(defined.launch, given), exact, run(defined.reference, given)
    for i, values in enumerate(zip(*results, strict=True)):
        if values[0] is not None and values[0].numel():
            assert_accurate(*values, what=f"{op}, output {i}")


@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("attention")], ids=str)
def test_attention_tiles_with_wgmma(case, monkeypatch):
    """Tiles for GPUs with wgmma: two blocks of queries and of keys, the second of each partial."""
    from llmos_kernels._triton.runtime import launch

    monkeypatch.setattr(launch, "has_wgmma", lambda device: True)
    batch, heads, q_len, k_len, d = case.shapes[-1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    args = case.make(
        (batch, heads, q_len + 128, k_len + 128, d),
        dtype=torch.float16,
        device=device,
        requires_grad=True,
    )
    for op, given in raw_calls(case, args):
        assert_attention_accurate(op.name(), given)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["keys", "expanded", "heads", "one", "holes", "none"])
def test_bool_masks_of_keys(kind, padded):
    """A bool mask equal for all queries and heads is read as key padding if there is none."""
    from llmos_kernels._triton.attention.scores import mask_arguments

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    batch, heads, n, keys, d = 2, 3, 5, 300, 16
    q, k, v, dout = (
        torch.randn(batch, length, heads, d, device=device).transpose(1, 2)
        for length in (n, keys, keys, n)
    )
    column = torch.arange(keys, device=device)
    row = (column > 20) & (column < 250)
    row = {"holes": row & (column % 3 > 0), "none": column < 0}.get(kind, row)
    mask = row.expand(1 if kind == "one" else batch, 1, 1, keys).clone()
    if kind == "heads":
        mask = mask.expand(batch, heads, 1, keys).clone()
    if kind == "expanded":
        mask = mask.expand(batch, 1, n, keys)
    padding = (column > 270).expand(batch, keys) if padded else None
    alone = not padded and kind != "heads"
    arguments = mask_arguments(mask, padding)
    assert (arguments["mask"] is None) == alone and arguments["mask_row"] is None
    options = d**-0.5, 0, 0.2, 0.0, torch.tensor([1, 2], device=device)
    given = q, k, v, mask, padding, None, None, None, *options
    assert_attention_accurate("llmos::attention_forward", given)
    out, stats = DEFINED["llmos::attention_forward"].reference(*given)
    assert_attention_accurate(
        "llmos::attention_backward", (dout, *given[:8], out, stats, *options, False)
    )
    assert_attention_accurate(
        "llmos::attention_weights", (q, k, mask, padding, stats, *options, False)
    )
