"""The emulation of CUDA finds planted faults, and its kernels read and write each byte once."""

import emulated_cuda
import pytest
import torch

from llmos_kernels._core import cuda_part
from llmos_kernels._core.registry import DEFINED
from llmos_kernels.testing import assert_within_budget, cast

FAULTS = {
    "not written": "shared memory is read before it is written",
    "no barrier": "shared memory is read ",  # Before its write, or without a barrier after it.
    "two writers": "two threads write to one word of shared memory",
    # By the order in which both run.
    "write after read": "shared memory is (read|written) without a barrier",
    "outside": "index [0-9]+ of shared memory \\[64\\]",
    "part of a barrier": "threads disagree about the barrier",
    "another barrier": "threads disagree about the barrier",
    "absent lanes": "(is in a mask, but absent|waits for absent lanes)",
    "two meetings": "lanes of a warp meet at different places",
    "misaligned": "a load of 8 bytes is not aligned",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_in_any_order(fault):
    for seed in range(5):
        emulated_cuda.seed(seed)
        with pytest.raises(RuntimeError, match=FAULTS[fault]):
            emulated_cuda.plant(fault)


def test_a_kernel_without_fault_runs():
    for seed in range(5):
        emulated_cuda.seed(seed)
        emulated_cuda.plant("")


@pytest.mark.parametrize("rows", [4, 5])
def test_calls_of_more_rows_are_handed_to_triton(rows):
    op = torch.ops.llmos_emulated
    args = torch.randn(rows, 8), None, None, 8, 1e-5, True
    with emulated_cuda.most_rows("layer_norm_forward", 4):
        emulated_cuda.accesses()
        y, _ = op.layer_norm_forward(*args)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(args[0], (8,)))
    assert any(emulated_cuda.accesses()[0].values()) == (rows == 4)


def test_wide_gradients_are_triton_s():
    wide = emulated_cuda.WIDEST_BACKWARD + 1
    dy, h, stats = torch.randn(2, wide), torch.randn(2, wide), torch.rand(2, 2)
    args = dy, None, h, None, stats, wide, True, 0.0, None, False, False
    emulated_cuda.accesses()
    torch.ops.llmos_emulated.layer_norm_backward(*args)
    assert not any(emulated_cuda.accesses()[0].values())


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: Arguments of calls and the bytes that they have to load and store, each once. Statistics, scales
#: and indices are not counted in 16 bytes; parameters are read again for each row.
NORM_CALLS = [(rows, d, dtype) for rows, d in ((8, 768), (3, 4096)) for dtype in (F32, BF16)]


def wide(counts):
    """Return the bytes that are read or written 16 at a time, and all others."""
    return 16 * counts[16], sum(size * n for size, n in counts.items() if size < 16)


@pytest.mark.parametrize(("rows", "d", "dtype"), NORM_CALLS, ids=str)
def test_norms_read_and_write_each_byte_once(rows, d, dtype):
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, d), (d,), (d,)))
    row = d * x.itemsize
    emulated_cuda.accesses()
    torch.ops.llmos_emulated.layer_norm_forward(x, weight, bias, d, 1e-5, True)
    loads, stores = map(wide, emulated_cuda.accesses())
    assert loads == (3 * rows * row, 0) and stores == (rows * row, 2 * rows * 4)
    args = x, x, weight, bias, d, 1e-5, True, 0.5, torch.tensor([1, 2])
    _, h, stats = torch.ops.llmos_emulated.add_layer_norm_forward(*args)
    loads, stores = map(wide, emulated_cuda.accesses())
    threads = emulated_cuda.threads(rows, d)
    assert loads == (4 * rows * row, threads * 16) and stores == (2 * rows * row, 2 * rows * 4)
    torch.ops.llmos_emulated.layer_norm_backward(
        x, None, h, weight, stats, d, True, 0.0, None, True, True
    )
    loads, stores = map(wide, emulated_cuda.accesses())
    # dy, h, weight; one sum for each row and gradient is written and read in float32.
    assert loads == (3 * rows * row, threads * 8 + 2 * rows * d * 4)
    assert stores == (rows * row + 2 * rows * d * 4, 2 * d * x.itemsize)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_products_read_the_weight_once(dtype):
    rows, inner, outer = 4, 1024, 64
    x, weight, scale = (
        torch.randn(rows, inner).to(dtype),
        torch.ones(outer, inner).char(),
        torch.ones(outer),
    )
    blocks = outer // 4
    emulated_cuda.accesses()
    torch.ops.llmos_emulated.int8_weight_only(x, weight, scale, None, 0)
    loads, stores = map(wide, emulated_cuda.accesses())
    # Every block of four columns reads the input, from the L2 cache.
    assert loads == (outer * inner + blocks * rows * inner * x.itemsize, rows * outer * 4)
    assert stores == (0, rows * outer * x.itemsize)
    torch.ops.llmos_emulated.int8_linear(x, weight, scale, None, None, 0, 0.0)
    loads, stores = map(wide, emulated_cuda.accesses())
    quantized, read = rows * inner, rows * inner * x.itemsize
    assert loads[0] == read + outer * inner + blocks * quantized


def test_who_computes_is_read_from_files_and_the_environment(tmp_path, monkeypatch):
    (tmp_path / "gpu").mkdir()
    file = tmp_path / "gpu" / "cuda-sm_90.json"
    file.write_text('{"sm_90": {"layer_norm_forward": 7}, "sm_80": {"layer_norm_forward": 1}}')
    monkeypatch.setenv("LLMOS_TUNED", str(tmp_path))

    def runs_here(rows, width=8):
        emulated_cuda.accesses()
        x = torch.randn(rows, width)
        torch.ops.llmos_emulated.layer_norm_forward(x, None, None, width, 1e-5, True)
        return any(emulated_cuda.accesses()[0].values())

    with emulated_cuda.most_rows("layer_norm_forward", 100):
        cuda_part.configure(emulated_cuda.LIBRARY)
        assert runs_here(7) and not runs_here(8)
        monkeypatch.setenv("LLMOS_CUDA", "triton")
        cuda_part.configure(emulated_cuda.LIBRARY)
        assert not runs_here(1)
        file.write_text('{"sm_90": {"layer_norm_forward": {"4": 9, "8": 2, "16": 5, "32": 1}}}')
        monkeypatch.delenv("LLMOS_CUDA")
        cuda_part.configure(emulated_cuda.LIBRARY)
        found = {width: [n for n in (1, 2, 4) if runs_here(n, width)] for width in (3, 6, 9, 40)}
        assert found == {3: [1, 2, 4], 6: [1, 2], 9: [1, 2, 4], 40: [1]}
        monkeypatch.setenv("LLMOS_CUDA", "cpp")
        cuda_part.configure(emulated_cuda.LIBRARY)
        assert runs_here(8)
        monkeypatch.setenv("LLMOS_CUDA", "ptx")
        with pytest.raises(ValueError, match="LLMOS_CUDA must be cpp or triton, got 'ptx'"):
            cuda_part.configure(emulated_cuda.LIBRARY)
        monkeypatch.delenv("LLMOS_CUDA")
        for wrong, why in {
            '"many"': "rows of layer_norm_forward must be a number of 0 to 2.62, got 'many'",
            '{"8": -1}': "rows of layer_norm_forward must be a number of 0 to 2.62, got -1",
            '{"wide": 1}': "widths of layer_norm_forward must be numbers, got 'wide'",
        }.items():
            file.write_text(f'{{"sm_90": {{"layer_norm_forward": {wrong}}}}}')
            with pytest.warns(RuntimeWarning, match=why):
                cuda_part.configure(emulated_cuda.LIBRARY)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(1, 700, 264), (4, 513, 33), (2, 0, 8), (3, 1, 5)]
)
def test_sparse_products_read_only_what_they_need(rows, inner, outer, dtype):
    torch.manual_seed(0)
    x = torch.randn(rows, inner).relu().to(dtype)
    x[:, ::3] = 0
    weight = torch.randn(inner, outer).to(dtype).mT
    weight[:, ::3] = float("nan")  # Of columns that are not needed.
    bias = torch.randn(outer).to(dtype)
    emulated_cuda.accesses()
    for b, activation in ((bias, 1), (None, 0)):
        args = x, weight, b, activation, 0.0, None, False
        out, _ = torch.ops.llmos_emulated.linear_forward(*args)
        clean = weight.nan_to_num(0.0)
        exact = x.double() @ clean.double().mT + (0 if b is None else b.double())
        exact = exact.relu() if activation else exact
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance * 32)
    needed = int((x != 0).any(0).sum())
    if inner == 700:
        pack = 16 // x.itemsize
        assert emulated_cuda.accesses()[0][16] == 2 * needed * outer // pack


def layer_arguments(dtype, together, bias):
    """Return the parameters of an encoder layer 32 wide."""
    torch.manual_seed(0)
    draw = lambda *shape: (torch.randn(*shape) / 5).to(dtype)
    vector = lambda n: draw(n) if bias else None
    shapes = [(96, 32)] if together else [(32, 32)] * 3
    weights = [draw(*shape) for shape in shapes]
    biases = [draw(shape[0]) for shape in shapes] if bias else []
    rest = draw(32, 32), vector(32), draw(32), vector(32), draw(64, 32), vector(64)
    return weights, biases, *rest, draw(32, 64), vector(32), draw(32), vector(32)


@pytest.mark.parametrize("masked", ["", "padding", "mask", "packed"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_whole_layer_calls_norms_products_and_attention(dtype, norm_first, masked):
    op = DEFINED["llmos::encoder_layer"]
    emulated = emulated_cuda.kernel(torch.ops.llmos.encoder_layer.default)
    src = torch.randn(2, 5, 32).to(dtype)
    padding = torch.arange(5)[None] >= torch.tensor([[3], [5]]) if masked == "padding" else None
    mask = torch.randn(1, 4, 5, 5).to(dtype) if masked == "mask" else None
    cu_seqlens = None
    if masked == "packed":
        src, cu_seqlens = src.view(1, 10, 32), torch.tensor([0, 3, 10], dtype=torch.int32)
    for together, activation in ((True, 1), (False, 3), (False, 4), (True, 2), (False, 5)):
        parameters = layer_arguments(dtype, together, bias=activation != 5)
        options = 4, 8**-0.5, activation, norm_first, 1e-5, 1e-6, []
        args = src, mask, padding, cu_seqlens, *parameters, *options
        emulated_cuda.accesses()
        before = cuda_part.attention_calls(emulated_cuda.LIBRARY)
        made = emulated(*args)
        calls = cuda_part.attention_calls(emulated_cuda.LIBRARY)
        whose = "triton" if masked else "torch"
        assert {who: calls[who] - n for who, n in before.items() if calls[who] > n} == {whose: 1}
        assert any(emulated_cuda.accesses()[0].values()), "the norms ran elsewhere"
        exact = op.reference(*cast(args, torch.float64))
        compared = {"output": (made, exact, op.reference(*args))}
        assert_within_budget([compared], f"encoder_layer, activation {activation}")


@pytest.mark.parametrize(("rows", "d"), [(600, 264), (530, 7)])
def test_gradients_of_more_rows_than_groups(rows, d):
    """A group takes several rows, and its threads meet again for each."""
    torch.manual_seed(0)
    x, dy, weight = torch.randn(rows, d), torch.randn(rows, d), torch.randn(d)
    _, stats = torch.ops.llmos.layer_norm_forward(x, weight, None, d, 1e-5, True)
    args = dy, None, x, weight, stats, d, True, 0.0, None, True, True
    op = DEFINED["llmos::layer_norm_backward"]
    names = "dresidual", "dx", "dweight", "dbias"
    made = torch.ops.llmos_emulated.layer_norm_backward(*args)
    exact, eager = op.reference(*cast(args, torch.float64)), op.reference(*args)
    compared = dict(zip(names, zip(made, exact, eager, strict=True), strict=True))
    assert_within_budget([compared], "more rows than groups")


def test_no_policy_gives_a_kernel_more_rows_than_it_has(monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(8, 32).relu(), torch.randn(32, 16).mT
    int8, scale, rows = torch.ones(16, 32).char(), torch.ones(16), torch.randn(17, 32)
    monkeypatch.setenv("LLMOS_CUDA", "cpp")
    with emulated_cuda.most_rows("linear_forward", 4):
        cuda_part.configure(emulated_cuda.LIBRARY)
        out, _ = torch.ops.llmos_emulated.linear_forward(x, weight, None, 0, 0.0, None, False)
        many = torch.ops.llmos_emulated.int8_weight_only(rows, int8, scale, None, 0)
    torch.testing.assert_close(out, x @ weight.mT)
    torch.testing.assert_close(many, rows.sum(1, keepdim=True).expand(17, 16), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_no_order_of_threads_changes_a_bit(seed):
    """Of rows that a warp has, and rows that a block has; each launch draws an order of its own."""
    op = torch.ops.llmos_emulated
    for rows, d in ((3, 264), (40, 1032)):
        torch.manual_seed(0)
        x, weight = torch.randn(rows, d), torch.randn(d)
        int8 = torch.randint(-99, 99, (12, d), dtype=torch.int8)
        stats, scale = torch.rand(2, rows), torch.rand(12)
        few, sparse, by_columns = x[:3], x[:3].relu(), torch.randn(d, 24).mT
        made = []
        for order in (0, 1000 + seed, 2000 + seed):
            emulated_cuda.seed(order)
            made.append(
                (
                    *op.layer_norm_forward(x, weight, weight, d, 1e-5, True),
                    *op.add_layer_norm_forward(
                        x, x, weight, None, d, 1e-5, True, 0.3, torch.tensor([1, 2])
                    ),
                    *op.layer_norm_backward(
                        x, None, x, weight, stats, d, True, 0.0, None, True, True
                    ),
                    *op.int8_norm(x, None, weight, None, d, 1e-5, True),
                    *op.int8_quantize(x),
                    op.int8_linear(few, int8, scale, None, None, 1, 2.0),
                    op.int8_weight_only(few, int8, scale, None, 0),
                    *op.linear_forward(sparse, by_columns, None, 0, 0.0, None, False),
                )
            )
        for other in made[1:]:
            assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


def test_an_error_of_what_a_call_was_handed_to_keeps_its_text():
    args = torch.randn(2, 5, 32), None, None, None, *layer_arguments(F32, True, True)
    wrong = list(args)
    wrong[6] = torch.randn(32, 31)  # The weight of the output projection.
    emulated = emulated_cuda.kernel(torch.ops.llmos.encoder_layer.default)
    with pytest.raises(RuntimeError, match=r"aten::linear: .*32.*31"):
        emulated(*wrong, 4, 0.3, 1, False, 1e-5, 1e-5, [])


def test_a_whole_layer_refuses_wrong_arguments():
    emulated = emulated_cuda.kernel(torch.ops.llmos.encoder_layer.default)
    parameters = layer_arguments(F32, True, True)
    src, right = torch.randn(2, 5, 32), (4, 0.3, 1, False, 1e-5, 1e-5, [])
    cu_seqlens = torch.tensor([0, 10], dtype=torch.int32)
    for masks, options, why in (
        ((torch.zeros(5, 5), None), right, "attn_mask must have 4 dimensions"),
        ((torch.zeros(1, 3, 5, 5), None), right, "dimension 1 of attn_mask must be 1 or 4, got 3"),
        ((None, torch.zeros(2, 4).bool()), right, r"key_padding_mask must be bool \[2, 5\]"),
        ((None, torch.zeros(2, 5)), right, r"key_padding_mask must be bool \[2, 5\]"),
        ((None, None), (5, *right[1:]), "5 heads cannot share 32 features"),
        ((None, None), (4, 0.3, 9, *right[3:]), "there is no activation 9"),
    ):
        with pytest.raises(RuntimeError, match=why):
            emulated(src, *masks, None, *parameters, *options)
    with pytest.raises(RuntimeError, match=r"cu_seqlens must be int32 .* with a batch of 1, got 2"):
        emulated(src, None, None, cu_seqlens, *parameters, *right)


@pytest.mark.parametrize(("rows", "d", "dtype"), NORM_CALLS, ids=str)
def test_other_kernels_of_rows_read_each_byte_once(rows, d, dtype):
    op = torch.ops.llmos_emulated
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, d), (d,), (d,)))
    row, threads = d * x.itemsize, emulated_cuda.threads(rows, d)
    emulated_cuda.accesses()
    op.int8_quantize(x)
    loads, stores = map(wide, emulated_cuda.accesses())
    assert loads == (rows * row, 0) and stores == (0, rows * d + rows * 4)
    op.int8_norm(x, None, weight, bias, d, 1e-5, True)
    loads, stores = map(wide, emulated_cuda.accesses())
    # Weight and bias for the largest magnitude, and again for the levels.
    assert loads == (5 * rows * row, 0) and stores == (0, rows * d + rows * 4)
    index, none = torch.arange(rows) % 2, None
    op.embedding_layer_norm_forward(index, none, none, x, none, none, weight, bias, 1e-5, 0.0, none)
    loads, stores = map(wide, emulated_cuda.accesses())
    assert loads == (3 * rows * row, threads * 8) and stores == (rows * row, 2 * rows * 4)


def test_quantized_products_read_the_weight_once():
    rows, inner, outer = 4, 1024, 64
    a, b = torch.ones(rows, inner).char(), torch.ones(outer, inner).char()
    emulated_cuda.accesses()
    ones = torch.ones(outer)
    torch.ops.llmos_emulated.int8_matmul(a, b, ones[:rows], ones, None, None, 0, F32)
    loads, stores = map(wide, emulated_cuda.accesses())
    assert loads == (outer * inner + outer // 4 * rows * inner, 2 * rows * outer * 4)
    assert stores == (0, rows * outer * 4)
