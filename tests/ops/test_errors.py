"""Calls that torch refuses raise here what ``except`` clauses written for torch catch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import llmos_kernels as lk


def called(cls):
    """Return a function that makes a module of the arguments after the first, and calls it."""
    return lambda x, *options: cls(*options)(x)


PAIRS = {
    "layer_norm": (lk.layer_norm, F.layer_norm),
    "rms_norm": (lk.rms_norm, F.rms_norm),
    "linear": (lk.linear, F.linear),
    "attention": (lk.scaled_dot_product_attention, F.scaled_dot_product_attention),
    "grouped attention": (
        partial(lk.scaled_dot_product_attention, enable_gqa=True),
        partial(F.scaled_dot_product_attention, enable_gqa=True),
    ),
    "LayerNorm": (called(lk.nn.LayerNorm), called(torch.nn.LayerNorm)),
    "RMSNorm": (called(lk.nn.RMSNorm), called(torch.nn.RMSNorm)),
    "Linear": (called(lk.nn.Linear), called(torch.nn.Linear)),
}
INT, BF16, F64 = torch.int64, torch.bfloat16, torch.float64


def t(*shape, dtype=torch.float32):
    """Return ones of a shape and dtype."""
    return torch.ones(shape, dtype=dtype)


def attention(*changed, q=(2, 4, 3, 8), k=(2, 4, 6, 8), v=(2, 4, 6, 8), dtypes=(None,) * 3):
    """Return the arguments of attention: query, key and value, and what follows them."""
    made = (t(*s, dtype=d or torch.float32) for s, d in zip((q, k, v), dtypes, strict=True))
    return (*made, *changed)


#: What both refuse: the function, what is wrong, the arguments.
REFUSED = [
    ("layer_norm", "no normalized_shape", (t(2, 3), ())),
    ("layer_norm", "no dimensions", (t(), (1,))),
    ("layer_norm", "normalized_shape", (t(3, 4), (5,))),
    ("layer_norm", "normalized_shape is an int", (t(3, 4), 4)),
    ("layer_norm", "shape of weight", (t(3, 4), (4,), t(5))),
    ("layer_norm", "shape of bias", (t(3, 4), (4,), t(4), t(5))),
    ("layer_norm", "dtype of weight", (t(3, 4), (4,), t(4, dtype=BF16))),
    ("layer_norm", "wide weight", (t(3, 4), (4,), t(4, dtype=F64))),
    ("layer_norm", "dtype of bias", (t(3, 4), (4,), t(4), t(4, dtype=BF16))),
    ("layer_norm", "mixed parameters", (t(3, 4, dtype=BF16), (4,), t(4), t(4, dtype=BF16))),
    ("rms_norm", "no normalized_shape", (t(2, 3), ())),
    ("rms_norm", "no dimensions", (t(), (1,))),
    ("rms_norm", "normalized_shape", (t(3, 4), (5,))),
    ("rms_norm", "shape of weight", (t(3, 4), (4,), t(5))),
    ("linear", "no dimensions", (t(), t(5, 4))),
    ("linear", "widths", (t(3, 4), t(5, 3))),
    ("linear", "3-D weight", (t(3, 4), t(2, 5, 4))),
    ("linear", "width of bias", (t(3, 4), t(5, 4), t(4))),
    ("linear", "dtype of weight", (t(3, 4), t(5, 4, dtype=BF16))),
    ("linear", "dtype of bias", (t(3, 4), t(5, 4), t(5, dtype=BF16))),
    ("attention", "1-D", attention(q=(3,), k=(3,), v=(3,))),
    ("attention", "head dims", attention(k=(2, 4, 6, 9))),
    ("attention", "batches", attention(k=(3, 4, 6, 8), v=(3, 4, 6, 8))),
    ("attention", "heads", attention(k=(2, 3, 6, 8), v=(2, 3, 6, 8))),
    ("grouped attention", "heads", attention(k=(2, 3, 6, 8), v=(2, 3, 6, 8))),
    ("attention", "mask", attention(t(3, 5))),
    ("attention", "mask of a larger batch", attention(t(3, 1, 3, 6))),
    ("attention", "int mask", attention(t(3, 6, dtype=INT))),
    ("attention", "wide mask", attention(t(3, 6, dtype=F64))),
    ("attention", "dtypes", attention(dtypes=(None, BF16, None))),
    ("attention", "int", attention(dtypes=(INT, INT, INT))),
    ("attention", "dropout", attention(None, 1.5)),
    ("attention", "negative dropout", attention(None, -1.0)),
    ("LayerNorm", "no normalized_shape", (t(3, 4), ())),
    ("LayerNorm", "width", (t(3, 5), 4)),
    ("RMSNorm", "no normalized_shape", (t(3, 4), ())),
    ("RMSNorm", "width", (t(3, 5), 4)),
    ("Linear", "width", (t(3, 5), 4, 5)),
    ("Linear", "dtype", (t(3, 4, dtype=BF16), 4, 5)),
    ("Linear", "width, large", (t(600, 500), 501, 600)),
]
NAMES_THE_DTYPE = "torch raises NotImplementedError, ours a TypeError that names the dtype"
NO_KERNEL = "torch has a kernel for the dtype; ours are for floating-point numbers"
UNDOCUMENTED = "torch takes it, and does not say so in its documentation"
DIMS = "kernels take rows of 1 to 256 numbers"
DROPS_ALL = "dropout multiplies what stays by 1 / (1 - p)"
LEAVES_OUT = "torch's kernel for CPUs leaves out the last values; its others raise"
SMALL_MASK = "a mask of fewer than two dimensions broadcasts like any other"
EXACT = "every bfloat16 number is a float32 number"
COMBINED = "all masks may be combined; torch's kernel for CPUs does so without dropout"
WIDE = attention(q=(1, 1, 3, 300), k=(1, 1, 6, 300), v=(1, 1, 6, 8))
#: What only one refuses, or ours with another class: what torch does, what ours does, and why.
ACCEPTED = [
    ("layer_norm", "int", (t(3, 4, dtype=INT), (4,)), "raises", "raises", NAMES_THE_DTYPE),
    ("rms_norm", "int", (t(3, 4, dtype=INT), (4,)), "raises", "raises", NAMES_THE_DTYPE),
    ("rms_norm", "complex", (t(3, 4, dtype=torch.cfloat), (4,)), "runs", "raises", NO_KERNEL),
    ("linear", "int", (t(3, 4, dtype=INT), t(5, 4, dtype=INT)), "runs", "raises", NO_KERNEL),
    ("linear", "1-D weight", (t(3, 4), t(4)), "runs", "raises", UNDOCUMENTED),
    ("linear", "bias [1]", (t(3, 4), t(5, 4), t(1)), "runs", "raises", UNDOCUMENTED),
    ("attention", "head dim 0", attention(q=(2, 4, 3, 0), k=(2, 4, 6, 0)), "runs", "raises", DIMS),
    ("attention", "head dim 300", WIDE, "runs", "raises", DIMS),
    ("attention", "all dropped", attention(None, 1.0), "runs", "raises", DROPS_ALL),
    ("attention", "length of value", attention(v=(2, 4, 7, 8)), "runs", "raises", LEAVES_OUT),
    ("attention", "no heads", attention(q=(2, 0, 3, 8), k=(2, 0, 6, 8), v=(2, 0, 6, 8)))
    + ("runs", "raises", "nothing would be computed"),
    ("grouped attention", "other heads of value", attention(k=(2, 2, 6, 8), v=(2, 1, 6, 8)))
    + ("runs", "raises", "kernels read a value beside each key"),
    ("grouped attention", "no heads", attention(q=(3, 8), k=(6, 8), v=(6, 8)))
    + ("raises", "runs", "there is one head, and one group"),
    (
        "attention",
        "4-D mask of 3-D tensors",
        attention(t(2, 1, 3, 6), q=(2, 3, 8), k=(2, 6, 8), v=(2, 6, 8)),
    )
    + ("raises", "runs", "the mask may have a dimension of heads, of size 1"),
    ("attention", "1-D mask", attention(t(6)), "raises", "runs", SMALL_MASK),
    ("attention", "0-D mask", attention(t()), "raises", "runs", SMALL_MASK),
    ("attention", "bfloat16 mask", attention(t(3, 6, dtype=BF16)), "raises", "runs", EXACT),
    ("attention", "causal mask", attention(t(3, 6), 0.1, True), "raises", "runs", COMBINED),
]


def outcome(function, args):
    """Return what a call raises, or None."""
    try:
        function(*args)
    except Exception as e:
        return e
    return None


@pytest.mark.parametrize("name, args", [pytest.param(n, a, id=f"{n}, {w}") for n, w, a in REFUSED])
def test_refused_as_torch_does(name, args):
    """Ours is an error of torch's class, and says something."""
    ours, theirs = (outcome(function, args) for function in PAIRS[name])
    assert theirs is not None, "torch takes it now"
    assert isinstance(ours, type(theirs)) and str(ours)


@pytest.mark.parametrize(
    "name, args, theirs, ours", [pytest.param(n, *a[:3], id=f"{n}, {w}") for n, w, *a in ACCEPTED]
)
def test_accepted_differences(name, args, theirs, ours):
    """An entry that is no longer true has to go."""
    found = [outcome(function, args) for function in PAIRS[name]]
    assert ["runs" if e is None else "raises" for e in found] == [ours, theirs]
    if theirs == ours:
        assert not isinstance(found[0], type(found[1]))


def test_both_classes():
    """A ValueError or TypeError as documented, and a RuntimeError as torch's."""
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match="last dimensions"):
            lk.layer_norm(t(3, 4), (5,))
    for error in (TypeError, RuntimeError):
        with pytest.raises(error, match="dtype of input"):
            lk.linear(t(3, 4), t(5, 4, dtype=BF16))
