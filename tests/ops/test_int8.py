"""int8 quantization and products give the integers of the reference, in any layout."""

import emulated_cuda
import pytest
import torch
import torch.nn.functional as F
from int8_checks import SHAPES, arguments, exact

import llmos_kernels as lk
from llmos_kernels._core.registry import DEFINED
from llmos_kernels.ops.int8 import MAX_INNER, MAX_UNSIGNED, quantize_reference
from llmos_kernels.testing import DTYPES


@pytest.fixture(params=emulated_cuda.DEVICES)
def device(request):
    with emulated_cuda.device_of(request.param) as device:
        yield device


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_integers(shape, dtype, device):
    x, weight, scale, bias = arguments(*shape, dtype, device)
    rows, row_scale = lk.int8_quantize(x)
    for actual, expected in zip(
        (rows, row_scale), lk.int8_quantize(x, backend="reference"), strict=True
    ):
        assert torch.equal(actual, expected)
    assert (rows * row_scale[:, None] - x).abs().le(row_scale[:, None] * 0.50001).all()
    for b in (bias, None):
        expected = exact(rows, weight, row_scale, scale, b, dtype)
        for backend in (None, "reference"):
            args = rows, weight, row_scale, scale, b, None, dtype
            assert torch.equal(lk.int8_matmul(*args, backend=backend), expected)
            relu = lk.int8_matmul(*args[:5], "relu", dtype, backend=backend)
            assert torch.equal(relu, expected.relu())
    actual = lk.int8_matmul(rows, weight, row_scale, scale, bias, "gelu", dtype)
    torch.testing.assert_close(actual, F.gelu(exact(rows, weight, row_scale, scale, bias, dtype)))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(shape, dtype):
    """Triton gives the same integers; scales and activations agree but for rounding."""
    pytest.importorskip("triton")
    quantize, matmul = (DEFINED[f"llmos::int8_{name}"].launch for name in ("quantize", "matmul"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight, scale, bias = arguments(*shape, dtype, device)
    if len(x) > 3 and x.shape[1] > 2:
        x[2, 1], x[3, 2] = float("nan"), float("inf")
    x = x.mT.contiguous().mT
    rows, row_scale = quantize(x)
    for actual, expected in zip(
        (rows, row_scale), lk.int8_quantize(x, backend="reference"), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    for b, activation in ((bias, 0), (None, 3)):
        args = rows, weight, row_scale, scale, None, b, activation, dtype
        reference = DEFINED["llmos::int8_matmul"].reference
        torch.testing.assert_close(matmul(*args), reference(*args), equal_nan=True)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_a_layer(shape, dtype, device):
    """``int8_linear_rows`` gives the bits of ``int8_linear`` followed by quantization."""
    x, weight, scale, bias = arguments(*shape, dtype, device)
    vnni_weight = lk.int8_vnni_weight(weight)
    for activation, unsigned in (("relu", True), (None, False)):
        y = lk.int8_linear(x, weight, scale, bias, activation)
        expected = quantize_reference(y, unsigned)
        for options in ({}, {"vnni_weight": vnni_weight}, {"backend": "reference"}):
            made = lk.int8_linear_rows(x, weight, scale, bias, activation, **options)
            for actual, wanted in zip(made, expected, strict=True):
                assert actual.dtype == wanted.dtype and torch.equal(actual, wanted)
    if y.shape[1]:
        second = torch.randint(-128, 128, (9, y.shape[1]), dtype=torch.int8, device=device)
        rows, row_scale = lk.int8_linear_rows(x, weight, scale, bias, "relu")
        for options in ({}, {"vnni_weight": lk.int8_vnni_weight(second)}, {"backend": "reference"}):
            actual = lk.int8_matmul(rows, second, row_scale, scale.new_ones(9), **options)
            assert torch.equal(
                actual, exact(rows, second, row_scale, scale.new_ones(9), None, torch.float32)
            )


@each_dtype
@pytest.mark.parametrize("shape", ((0, 8), (3, 0), (1, 1), (5, 33), (70, 768), (3, 20000)), ids=str)
def test_rows_of_a_norm(shape, dtype, device):
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape, device=device).to(dtype)
    weight, bias = torch.randn(2, shape[1], device=device)
    h = residual + x
    for backend in (None, "reference"):
        rows, scale = lk.int8_layer_norm(x, shape[1:], weight, bias, backend=backend)
        y = lk.layer_norm(x, shape[1:], weight, bias, backend=backend)
        expected = lk.int8_quantize(y, backend=backend)
        assert torch.equal(rows, expected[0]) and torch.equal(scale, expected[1])
        *both, kept = lk.int8_add_layer_norm(x, residual, shape[1:], backend=backend)
        expected = lk.int8_quantize(lk.layer_norm(h, shape[1:], backend=backend), backend=backend)
        assert torch.equal(kept, h)
        assert torch.equal(both[0], expected[0]) and torch.equal(both[1], expected[1])
    strided = lk.int8_layer_norm(x.repeat(1, 2)[:, : shape[1]], shape[1:], weight, bias)
    again = lk.int8_layer_norm(x, shape[1:], weight, bias)
    assert torch.equal(strided[0], again[0])


@pytest.mark.parametrize("shape", ((3, 0), (1, 1), (5, 33), (70, 768), (2, 20000)), ids=str)
def test_triton_rows(shape):
    """Quantized norms differ by at most one: the norms agree but for rounding."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape, device=device)
    x[-1:] = 0
    weight, bias = torch.randn(2, shape[1], device=device)
    launch, reference = (
        getattr(DEFINED["llmos::int8_norm"], name) for name in ("launch", "reference")
    )
    for given in (residual, None):
        args = x, given, weight, bias, shape[1], 1e-5, True
        actual, expected = launch(*args), reference(*args)
        assert (actual[0].int() - expected[0].int()).abs().le(1).all()
        torch.testing.assert_close(actual[1:], expected[1:])
    op = DEFINED["llmos::int8_linear_rows"]
    weight_int8 = torch.randint(-128, 128, (40, shape[1]), dtype=torch.int8, device=device)
    scale = torch.rand(40, device=device)
    second = torch.randint(-128, 128, (9, 40), dtype=torch.int8, device=device)
    matmul = DEFINED["llmos::int8_matmul"]
    for activation in (0, 1):
        args = x, weight_int8, scale, None, None, activation
        actual, expected = op.launch(*args), op.reference(*args)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        args = expected[0], second, expected[1], scale[:9], None, None, 0, torch.float32
        torch.testing.assert_close(matmul.launch(*args), matmul.reference(*args))


def test_extreme_sums(device):
    """Sums of the extreme elements over the longest row do not overflow int32."""
    for low, high in ((-128, -128), (-128, 127), (127, 127)):
        for rows in (2, 6, 257):
            a = torch.full((rows, MAX_INNER), low, dtype=torch.int8, device=device)
            b = torch.full((3, MAX_INNER), high, dtype=torch.int8, device=device)
            ones = torch.ones(rows, device=device)
            out = lk.int8_matmul(a, b, ones, ones[:1].expand(3))
            assert (out == float(torch.tensor(float(low * high * MAX_INNER)))).all()
    for high in (-128, 127):
        for rows in (2, 6, 257):
            a = torch.full((rows, MAX_UNSIGNED), 255, dtype=torch.uint8, device=device)
            b = torch.full((3, MAX_UNSIGNED), high, dtype=torch.int8, device=device)
            ones = torch.ones(rows, device=device)
            out = lk.int8_matmul(a, b, ones, ones[:1].expand(3))
            assert (out == float(torch.tensor(float(255 * high * MAX_UNSIGNED)))).all()


def test_rows_without_a_scale(device):
    x = torch.randn(6, 40, device=device)
    x[0], x[1] = 0, 1e-37
    x[2, 3], x[3, 4], x[4, 5] = float("nan"), float("inf"), -float("inf")
    rows, scale = lk.int8_quantize(x)
    assert scale[:2].eq(0).all() and scale[2:5].isnan().all() and not rows[:5].any()
    weight, weight_scale = lk.int8_quantize(torch.randn(7, 40, device=device))
    y = lk.int8_linear(x, weight, weight_scale)
    assert y[:2].eq(0).all() and y[2:5].isnan().all() and y[5].isfinite().all()


def test_opcheck():
    x, weight, scale, bias = arguments(20, 40, 24)
    rows, row_scale = lk.int8_quantize(x)
    torch.library.opcheck(torch.ops.llmos.int8_quantize.default, (x,))
    torch.library.opcheck(
        torch.ops.llmos.int8_matmul.default,
        (rows, weight, row_scale, scale, None, bias, 1, x.dtype),
    )
    check = torch.library.opcheck
    check(torch.ops.llmos.int8_linear_rows.default, (x, weight, scale, None, bias, 1))
    check(torch.ops.llmos.int8_norm.default, (x, None, None, None, 40, 1e-5, True))
    check(torch.ops.llmos.int8_norm.default, (x, x, x[0], x[0], 40, 1e-5, True))
    args = weight, scale, None, bias, 3, 6.0
    torch.library.opcheck(torch.ops.llmos.int8_linear.default, (x, *args))
    torch.library.opcheck(
        torch.ops.llmos.int8_weight_only.default, (x[:16], weight, scale, bias, 1)
    )
    if lk.int8_vnni_weight(weight) is not None:
        torch.library.opcheck(torch.ops.llmos.int8_vnni_weight.default, (weight,))


def test_bad_input():
    x, weight, scale, bias = arguments(3, 8, 5)
    rows, row_scale = lk.int8_quantize(x)
    long = torch.zeros(1, MAX_INNER + 1)
    for error, words, call in (
        (TypeError, "torch.int64", lambda: lk.int8_quantize(rows.long())),
        (ValueError, "none", lambda: lk.int8_quantize(x[0, 0])),
        (TypeError, "weight_int8.*torch.float32", lambda: lk.int8_linear(x, x, scale)),
        (TypeError, "a must be int8.*float32", lambda: lk.int8_matmul(x, weight, row_scale, scale)),
        (ValueError, r"\[5, 8\].*\[3, 7\]", lambda: lk.int8_linear(x[:, :7], weight, scale)),
        (ValueError, r"weight_scale.*\[5\].*\[4\]", lambda: lk.int8_linear(x, weight, scale[:4])),
        (TypeError, "weight_scale.*float64", lambda: lk.int8_linear(x, weight, scale.double())),
        (TypeError, "bias.*bfloat16", lambda: lk.int8_linear(x, weight, scale, bias.bfloat16())),
        (ValueError, "nan", lambda: lk.int8_linear(x, weight, scale, None, None, float("nan"))),
        (ValueError, "-1.0", lambda: lk.int8_linear(x, weight, scale, outlier_threshold=-1)),
        (ValueError, "'static'", lambda: lk.int8_linear(x, weight, scale, mode="static")),
        (
            ValueError,
            "6.0 with 'weight_only'",
            lambda: lk.int8_linear(x, weight, scale, None, None, 6.0, mode="weight_only"),
        ),
        (
            ValueError,
            r"vnni_weight must be \[1, 2, 64, 4\], got \[1, 3",
            lambda: lk.int8_linear(x, weight, scale, vnni_weight=rows.new_zeros(1, 3, 64, 4)),
        ),
        (ValueError, "'tanh'", lambda: lk.int8_linear(x, weight, scale, bias, "tanh")),
        (
            ValueError,
            str(MAX_INNER + 1),
            lambda: lk.int8_linear(long, long.to(torch.int8), scale[:1]),
        ),
        (
            TypeError,
            "torch.float64",
            lambda: lk.int8_matmul(rows, weight, row_scale, scale, out_dtype=torch.float64),
        ),
        (
            ValueError,
            str(MAX_UNSIGNED),
            lambda: lk.int8_matmul(
                torch.zeros(1, 65794, dtype=torch.uint8),
                torch.zeros(1, 65794).to(torch.int8),
                scale[:1],
                scale[:1],
            ),
        ),
        (TypeError, "float64", lambda: lk.int8_linear_rows(x.double(), weight, scale)),
        (TypeError, "float64", lambda: lk.int8_layer_norm(x.double(), (8,))),
        (ValueError, r"\[7\]", lambda: lk.int8_layer_norm(x, (7,))),
        (ValueError, "on meta", lambda: lk.int8_linear(x, weight.to("meta"), scale)),
        (ValueError, "'magic'", lambda: lk.int8_quantize(x, backend="magic")),
    ):
        with pytest.raises(error, match=words):
            call()
