"""The error budget holds for shapes, strides and special values drawn by Hypothesis."""

import pytest
import torch

from llmos_kernels._core import numerics
from llmos_kernels.testing import (
    CASES,
    DTYPES,
    InaccurateError,
    assert_within_budget,
    compare,
    map_tensors,
)

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
settings = hypothesis.settings(
    max_examples=40, deadline=None, derandomize=not numerics.shift, database=None
)
CHOSEN = [
    c for c in CASES if c.name in ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm")
]

SPECIAL = {
    "inf": float("inf"),
    "nan": float("nan"),
    "outlier": 1e4,
    "zero": 0.0,
    "subnormal": 1e-39,
    "tiny": 1e-30,
}


@st.composite
def arguments(draw):
    case, dtype = draw(st.sampled_from(CHOSEN)), draw(st.sampled_from(DTYPES))
    lead = draw(st.lists(st.integers(1, 5), max_size=2))
    shape = (*lead, draw(st.integers(3, 40)), draw(st.integers(8, 300)))
    seed = draw(st.integers(0, 2**16))
    scale, offset = draw(st.sampled_from([1, 1e-3, 100])), draw(st.sampled_from([0, 0, 1, 30]))
    step, skip = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    value = draw(st.sampled_from([None, *SPECIAL.values()]))
    places = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=3))

    def change(t):
        if t.shape != shape:
            return t
        t = (t * scale + offset).clone()
        if value is not None:
            t.view(-1)[torch.tensor(places) % t.numel()] = value
        # The values become a strided slice of a larger tensor.
        wide = t.new_full((*shape[:-1], shape[-1] * step + skip), float("nan"))
        wide[..., skip::step] = t
        return wide[..., skip::step]

    def build(i):
        """Return arguments with other random numbers for each i."""
        torch.manual_seed(seed + (i << 17))
        return map_tensors(change, case.make(shape, dtype=dtype, requires_grad=True))

    return case, build


@settings
@hypothesis.given(arguments())
def test_error_budget(drawn):
    case, build = drawn
    try:
        assert_within_budget(compare(case, build(0)), case.name)
    except InaccurateError as missed:  # By chance, or with all numbers that are alike.
        if missed.is_hopeless:
            raise
        assert_within_budget(compare(case, *map(build, range(17))), case.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e4])
def test_constant_rows_are_exactly_zero(value, dtype, device):
    """A constant row is normalized to exactly 0, not to amplified rounding errors of its mean."""
    from llmos_kernels import layer_norm

    for d in (3, 768, 1000, 20011):
        x = torch.full((2, d), value, dtype=dtype, device=device)
        assert not layer_norm(x, (d,)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(dtype, device):
    from llmos_kernels import add_layer_norm

    x = torch.randn(8, 129, dtype=dtype, device=device)
    clean = add_layer_norm(x, x, (129,))
    x[3, 5] = float("nan")
    for out, right in zip(add_layer_norm(x, x, (129,)), clean, strict=True):
        assert torch.equal(out[:3], right[:3]) and torch.equal(out[4:], right[4:])
        assert out[3].isnan().any()
