"""Linear layers with an int8 weight: outliers, weight-only, VNNI layout, strides, derivatives."""

import emulated_cuda
import pytest
import torch
import torch.nn.functional as F
from int8_checks import SHAPES, arguments, judged, with_outliers
from torch.autograd import forward_ad

import llmos_kernels as lk
from llmos_kernels._core.registry import DEFINED
from llmos_kernels.ops import _activations
from llmos_kernels.ops.int8_linear import WEIGHT_ONLY_ROWS, int8_linear_reference
from llmos_kernels.testing import DTYPES, assert_accurate, cast

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, None: lambda z: z}


@pytest.fixture(params=emulated_cuda.DEVICES)
def device(request):
    with emulated_cuda.device_of(request.param) as device:
        yield device


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outliers_and_weight_only(shape, dtype, device):
    x, weight, scale, bias = arguments(*shape, dtype, device)
    x = with_outliers(x)
    vnni_weight = lk.int8_vnni_weight(weight)

    def linear(*args, **options):
        return lk.int8_linear(*args, **options, vnni_weight=vnni_weight)

    for activation in (None, "gelu"):
        for fn in (lk.int8_linear, linear):
            judged(fn, x, weight, scale, bias, activation=activation, outlier_threshold=6.0)
        judged(lk.int8_linear, x, weight, scale, bias, activation=activation, mode="weight_only")
    none = linear(x, weight, scale, bias, outlier_threshold=1e9)
    for b in (vnni_weight, None):
        assert torch.equal(lk.int8_linear(x, weight, scale, bias, vnni_weight=b), none)


# Triton's interpreter multiplies bfloat16 wrongly.
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_linear(shape, dtype):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight, scale, bias = arguments(*shape, dtype, device)
    launch = DEFINED["llmos::int8_linear"].launch
    weight_only = DEFINED["llmos::int8_weight_only"].launch

    def linear(x, weight, scale, bias, activation=None, outlier_threshold=0.0):
        code = _activations.code_of(activation)
        return launch(x, weight, scale, None, bias, code, outlier_threshold)

    expected = lk.int8_linear(x, weight, scale, bias)
    torch.testing.assert_close(linear(x, weight, scale, bias), expected)
    x = with_outliers(x).mT.contiguous().mT
    judged(linear, x, weight, scale, bias, activation="gelu", outlier_threshold=6.0)
    if len(x) <= WEIGHT_ONLY_ROWS:
        judged(lambda *a, mode: weight_only(*a, 0), x, weight, scale, bias, mode="weight_only")


def test_vnni_weight():
    make_vnni_weight = torch.ops.llmos.int8_vnni_weight.default
    reference = DEFINED["llmos::int8_vnni_weight"].reference
    for shape in ((1, 1), (64, 4), (65, 7), (130, 300), (0, 5), (5, 0)):
        weight = torch.randint(-128, 128, shape, dtype=torch.int8)
        vnni_weight = lk.int8_vnni_weight(weight)
        assert torch.equal(make_vnni_weight(weight), reference(weight))
        if vnni_weight is not None:
            assert torch.equal(vnni_weight, reference(weight))
            assert torch.equal(lk.int8_vnni_weight(weight.mT.contiguous().mT), vnni_weight)
    vnni_weight = lk.int8_vnni_weight(
        weight := torch.randint(-128, 128, (130, 300), dtype=torch.int8)
    )
    if vnni_weight is not None:
        x, scale = torch.randn(20, 300), torch.ones(130)
        strided = vnni_weight.mT.contiguous().mT
        expected = lk.int8_linear(x, weight, scale)
        assert torch.equal(lk.int8_linear(x, weight, scale, vnni_weight=strided), expected)
    with pytest.raises(TypeError, match="float32"):
        lk.int8_vnni_weight(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"\[3\]"):
        lk.int8_vnni_weight(torch.zeros(3, dtype=torch.int8))


def test_outliers_that_are_not_numbers(device):
    """Infinity and NaN affect only their own rows."""
    x, weight, scale, bias = arguments(6, 40, 24, device=device)
    x = x.clamp(-5, 5)
    clean = lk.int8_linear(x.where(torch.arange(40, device=device) != 7, 0), weight, scale, bias)
    x[:, 7], x[2, 7], x[3, 9] = 0, float("inf"), float("nan")
    exact = int8_linear_reference(x, weight, scale, bias, outlier_threshold=6.0)
    y = lk.int8_linear(x, weight, scale, bias, outlier_threshold=6.0)
    torch.testing.assert_close(y, exact, equal_nan=True)
    assert y[2].isfinite().logical_not().all() and y[3].isnan().all()
    rest = [0, 1, 4, 5]
    torch.testing.assert_close(y[rest], clean[rest])


@each_dtype
def test_layouts(dtype, device):
    x, weight, scale, bias = arguments(37, 50, 21, dtype, device)
    expected = lk.int8_linear(x, weight, scale, bias)
    for layout in (
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    ):
        assert torch.equal(
            lk.int8_linear(layout(x), layout(weight), layout(scale), layout(bias)), expected
        )
    batched = lk.int8_linear(x[:36].view(3, 4, 3, 50), weight, scale, bias)
    assert torch.equal(batched.view(36, 21), expected[:36])
    assert torch.equal(lk.int8_linear(x[5], weight, scale, bias), expected[5])
    for n in (1, 3, 30):  # The bits of a row do not depend on its batch.
        assert torch.equal(lk.int8_linear(x[:n], weight, scale, bias), expected[:n])


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation, dtype, device):
    """Gradients are those of a linear layer with the dequantized weight."""
    x, weight, scale, bias = arguments(19, 40, 24, dtype, device)
    dout = torch.randn(19, 24, device=device).to(dtype)

    def grads(fn, x, bias, scale):
        x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
        y = fn(x, weight, scale, bias, activation)
        return [y, *torch.autograd.grad(y, (x, bias), dout.to(y))]

    def eager(x, weight, scale, bias, activation):
        rows, row_scale = lk.int8_quantize(x.float())
        rounded = (rows * row_scale[:, None]).to(x.dtype)
        w = (weight * scale[:, None]).to(x.dtype)
        return ACTIVATIONS[activation](F.linear(rounded + (x - x.detach()), w, bias))

    actual, allowed = grads(lk.int8_linear, x, bias, scale), grads(eager, x, bias, scale)
    wide = grads(int8_linear_reference, *cast((x, bias), torch.float64), scale)
    for i, values in enumerate(zip(actual, wide, allowed, strict=True)):
        assert_accurate(*values, f"{activation} {i}")


def test_second_and_forward_derivatives():
    x, weight, scale, bias = arguments(6, 10, 4)
    x.requires_grad_()

    def second(fn, activation):
        y = fn(x, weight, scale, bias, activation)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    for activation in ("silu", "relu", None):
        expected = second(int8_linear_reference, activation)
        assert expected.abs().max() > 0
        torch.testing.assert_close(second(lk.int8_linear, activation), expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones(6, 10))
        tangent = forward_ad.unpack_dual(lk.int8_linear(dual, weight, scale, bias)).tangent
    full = weight * scale[:, None]
    torch.testing.assert_close(tangent, full.sum(1).expand(6, 4))


def test_autocast_and_compile():
    x, weight, scale, bias = arguments(20, 40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = lk.int8_linear(x, weight, scale, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, lk.int8_linear(x.bfloat16(), weight, scale, bias.bfloat16()))
    compiled = torch.compile(lk.int8_linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, scale, bias), lk.int8_linear(x, weight, scale, bias))
