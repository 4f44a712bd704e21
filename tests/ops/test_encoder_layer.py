"""The encoder layer op against its reference, and what it leaves to the parts of a layer."""

import pytest
import torch
from guards import Guards
from product_policies import anew, put

from llmos_kernels._core.registry import DEFINED
from llmos_kernels.ops import _cpu_facts
from llmos_kernels.ops._encoder_layer import LayerMasks, encoder_layer, may_fuse, reference
from llmos_kernels.ops._product_policy import are_ours
from llmos_kernels.testing import DTYPES, assert_within_budget
from llmos_kernels.testing.cases.encoder_layer import (
    DRAWS,
    SHAPES,
    VARIANTS,
    Arguments,
    compare,
    eager,
    make,
)

op = torch.ops.llmos.encoder_layer.default
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


@each_dtype
@each_variant
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, variant, dtype):
    draws = [make(shape, **variant, dtype=dtype) for _ in range(DRAWS)]
    assert_within_budget([compare(given) for given in draws], f"{shape} {variant}")


@each_variant
def test_the_reference_is_what_eager_computes(variant):
    given = make(SHAPES[4], **variant, dtype=torch.float64)
    torch.testing.assert_close(reference(*given.flat()), eager(given), rtol=1e-9, atol=1e-11)


@each_variant
@pytest.mark.parametrize("shape", [(0, 3, 8, 16, 2), (2, 0, 8, 16, 2), (2, 3, 8, 0, 2)], ids=str)
def test_empty(shape, variant):
    given = make(shape, **variant)
    expected = eager(given)
    torch.testing.assert_close(op(*given.flat()), expected)


@each_dtype
@each_variant
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_reads_and_writes_no_other_memory(shape, variant, dtype):
    """All memory that the op takes is NaN at first, with guard bands around it."""
    given = make(shape, **variant, dtype=dtype)
    expected = op(*given.flat())
    guards = Guards()

    def guarded(value):
        if isinstance(value, (tuple, list)):
            return type(value)(map(guarded, value))
        return guards.copy_of(value) if isinstance(value, torch.Tensor) else value

    flat = guarded(given.flat())
    count = len(guards.buffers)
    with guards:  # The dispatcher would hide what the op allocates.
        actual = op._op_dk(torch._C.DispatchKey.CPU, *flat)
    assert len(guards.buffers) > count, "no allocation was seen"
    guards.assert_intact("encoder_layer")
    assert torch.equal(actual, expected)


@each_dtype
def test_padding_does_not_leak(dtype):
    given = make((2, 7, 24, 40, 3), "padding", dtype=dtype)
    mask = torch.arange(7) >= torch.tensor([[7], [4]])
    src = given.src.clone()
    src[1, 4:] = float("nan")
    clean, dirty = (op(x, None, mask, *given.flat()[3:]) for x in (given.src, src))
    assert torch.equal(clean[~mask], dirty[~mask])


@each_variant
def test_weights_of_any_strides(variant):
    given = make((2, 7, 24, 40, 3), **variant)

    def other(t):
        if not isinstance(t, torch.Tensor):
            return list(map(other, t)) if isinstance(t, list) else t
        return t.mT.contiguous().mT if t.dim() == 2 else t.repeat_interleave(2)[::2]

    strided = Arguments(given.src, given.masks, [other(p) for p in given.parameters], given.options)
    assert torch.equal(op(*strided.flat()), op(*given.flat()))


@each_variant
def test_opcheck_and_same_bits(variant):
    given = make((2, 30, 32, 64, 4), **variant)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, given.flat(), test_utils=tests)
    first = op(*given.flat())
    assert all(torch.equal(op(*given.flat()), first) for _ in range(20))


def test_a_sequence_does_not_depend_on_its_batch():
    given = make((5, 30, 32, 64, 4), dtype=torch.float32)
    whole, alone = op(*given.flat()), op(given.src[2:3].contiguous(), *given.flat()[1:])
    assert torch.equal(whole[2:3], alone)


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    given = make((2, 30, 32, 64, 4), apart=True)
    counts = []
    for run in (lambda: op(*given.flat()), lambda: eager(given)):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("heads", 5, "5 heads cannot share 24"),
        ("in_weights", [torch.ones(24, 24)], "has 24 rows"),
        ("in_weights", [torch.ones(24, 24)] * 2, "got 2"),
        ("out_weight", torch.ones(23, 24), "23 and 24 rows"),
        ("weight1", torch.ones(40, 23), "a weight of 24 columns, got 23"),
        ("weight2", torch.ones(24, 39), "a weight of 40 columns, got 39"),
        ("bias1", torch.ones(41), "a bias of 40 elements, got 41"),
        ("norm1_bias", torch.ones(25), "24 elements, got 25"),
        ("weight2", torch.ones(24, 40).half(), "dtype of src"),
        ("key_padding_mask", torch.ones(2, 6, dtype=torch.bool), r"bool \[2, 7\]"),
        ("key_padding_mask", torch.ones(2, 7), r"bool \[2, 7\]"),
        ("attn_mask", torch.ones(2, 7), "4 dimensions"),
        ("attn_mask", torch.ones(2, 2, 7, 7), "dimension 1 of attn_mask must be 1 or 3, got 2"),
    ],
)
def test_wrong_arguments(name, value, message):
    given = make((2, 7, 24, 40, 3), bias=False)
    fields = {field: part for field, part in given._asdict().items() if field != "src"}
    (field,) = (f for f, part in fields.items() if name in part._fields)
    given = given._replace(**{field: fields[field]._replace(**{name: value})})
    with pytest.raises(RuntimeError, match=message):
        op(*given.flat())


def test_what_is_left_to_the_parts():
    src, masks, parameters, options = make((2, 7, 24, 40, 3), "padding")
    weight, padding = parameters.weight1, masks.key_padding_mask
    none = LayerMasks()
    assert may_fuse(src, masks, weight) and may_fuse(src, none, weight)
    for x in (src.mT.contiguous().mT, src.double(), src[0], src.to("meta"), src.long()):
        assert not may_fuse(x, none, weight)
    hidden = torch.zeros(2, 3, 7, 7)
    assert may_fuse(src, LayerMasks(hidden), weight)
    for mask in (hidden[0], hidden.int(), hidden[:, :, 1:, :], hidden.to("meta")):
        assert not may_fuse(src, LayerMasks(mask), weight)
    for mask in (padding[:, 1:], padding.int(), padding.to("meta")):
        assert not may_fuse(src, LayerMasks(None, mask), weight)
    trained = weight.clone().requires_grad_()
    assert not may_fuse(src, masks, trained)
    assert not may_fuse(src, LayerMasks(hidden.clone().requires_grad_()), weight)
    with torch.no_grad():
        assert may_fuse(src, masks, trained)
    with torch.autocast("cpu", torch.bfloat16):
        assert not may_fuse(src, masks, weight)
    assert torch.func.vmap(lambda x: x * may_fuse(x, none, weight))(src[None]).sum() == 0
    for changed in (
        {"weight1": trained},
        {"weight1": weight.half()},
        {"weight1": torch.ones(40, 23)},
        {"out_weight": torch.ones(23, 24)},
    ):
        assert encoder_layer(src, masks, parameters._replace(**changed), options) is None
    assert encoder_layer(src, masks, parameters, options._replace(heads=5)) is None
    assert encoder_layer(src, LayerMasks(hidden[:, :2]), parameters, options) is None
    assert encoder_layer(src, LayerMasks(hidden), parameters, options) is not None


def test_the_policy_is_asked(monkeypatch):
    from llmos_kernels.ops import _product_policy

    given = make((2, 7, 24, 40, 3))
    shapes, device = ((24, 24), (40, 24)), torch.device("cpu")
    asked = []

    def choose(direction, dtype, device, rows, depth, width):
        asked.append((rows, depth, width))
        return "ours" if width < 40 else "mkl"

    anew(monkeypatch)
    monkeypatch.setattr(_product_policy, "choose", choose)
    monkeypatch.setattr(_product_policy, "_SMALL_MACS", 0)
    assert not are_ours(torch.float32, device, 14, shapes)
    assert are_ours(torch.float32, device, 14, shapes[:1])
    assert asked[:2] == [(14, 24, 24), (14, 24, 40)]
    assert encoder_layer(*given) is None
    count = len(asked)
    assert encoder_layer(*given) is None and len(asked) == count, "asked once for each size"


@pytest.mark.parametrize(
    ("times", "expected"),
    [([(100, 96), (400, 420)], True), ([(100, 80), (400, 405)], False), ([(9, 5), (9, 5)], True)],
)
def test_measured_products_are_judged_together(monkeypatch, tmp_path, times, expected):
    """One slow product does not keep a layer whose products are faster together."""
    sizes = (14, 24, 24), (14, 24, 40)
    points = [[*size, *us, None] for size, us in zip(sizes, times, strict=True)]
    library = _cpu_facts.torch_library(torch.float32, torch._C._get_mkldnn_enabled())
    put(tmp_path, "here.json", [("forward", "float32", library, points)])
    anew(monkeypatch, tmp_path)
    shapes = (24, 24), (40, 24)
    assert are_ours(torch.float32, torch.device("cpu"), 14, shapes) is expected


def test_the_cpu_has_a_kernel():
    assert "llmos::encoder_layer" in DEFINED
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU")
