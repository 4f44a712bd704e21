"""Products by our GEMM or torch's libraries: the choice, results, gradients, error budget."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from product_policies import HAS_ONEDNN, anew, pretend
from torch.utils._python_dispatch import TorchDispatchMode

import llmos_kernels as lk
from llmos_kernels import testing
from llmos_kernels._core import tuned
from llmos_kernels._tools import environment
from llmos_kernels.ops import _product_policy, _products
from llmos_kernels.ops._activations import NONE
from llmos_kernels.ops._product_measurements import LAYER
from llmos_kernels.ops.linear import project
from llmos_kernels.testing import assert_accurate, cast, make_gradients

ROWS, IN, HIDDEN = 1040, 520, 504  # More than 2^28 MACs.
DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
CPU = torch.device("cpu")
onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="torch has no oneDNN for this CPU")


class Ops(TorchDispatchMode):
    """Record the names of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.add(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


def arguments(dtype, columns=False, bias=True, requires_grad=False):
    torch.manual_seed(0)
    x, w1, w2 = torch.randn(2, ROWS // 2, IN), torch.randn(HIDDEN, IN), torch.randn(IN, HIDDEN)
    w1, w2 = w1 * IN**-0.5, w2 * HIDDEN**-0.5
    args = x, w1, torch.randn(HIDDEN) if bias else None, w2, torch.randn(IN) if bias else None
    args = [a if a is None else a.to(dtype) for a in args]
    if columns:
        args[1], args[3] = (a.mT.contiguous().mT for a in (args[1], args[3]))
    return [a if a is None else a.requires_grad_(requires_grad) for a in args]


@onednn
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", ["amx", "avx512_bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward(activation, level, dtype, monkeypatch):
    mkl = level == "amx"
    pretend(monkeypatch, level, mkl, mkl)
    for columns, bias in ((False, True), (True, False)):
        x, w, b, *_ = arguments(dtype, columns, bias)

        def eager(x, w, b):
            return ACTIVATIONS[activation](F.linear(x, w, b))

        with torch.no_grad(), Ops() as ops:
            actual = lk.linear(x, w, b, activation)
        by_onednn = dtype == torch.bfloat16 and activation != "relu2" and level != "amx"
        by_mkl = dtype == torch.float32 and activation is None and mkl
        assert ("_linear_pointwise" in ops.seen) == by_onednn
        assert ("linear_forward" in ops.seen) != (by_onednn or by_mkl)
        exact = eager(*cast((x, w, b), torch.float64))
        assert_accurate(actual, exact, eager(x, w, b), f"{activation} {columns}")


@onednn
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cpu", ["plain", "tiles", "amx"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_gradients(activation, cpu, dtype, monkeypatch):
    """Gradients by oneDNN, MKL and our kernels are accurate, with and without AMX."""
    pretend(monkeypatch, "amx" if cpu == "amx" else "avx512_bf16", cpu != "plain", cpu == "amx")
    by_torch = cpu != "plain" and (cpu == "amx") == (dtype == torch.float32)

    def eager(x, w1, b1, w2, b2):
        return F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)

    def fused(*args):
        return lk.feed_forward(*args, activation)

    def single(x, w1, b1, w2, b2):
        return lk.linear(lk.linear(x, w1, b1, activation), w2, b2)

    args = arguments(dtype, requires_grad=True)

    def run(fn, args):
        out = fn(*args)
        return [out, *torch.autograd.grad(out, args, [g.to(out) for g in gradients])]

    gradients = make_gradients([eager(*args)])
    exact, allowed = run(eager, cast(args, torch.float64)), run(eager, args)
    for fn in (fused, single):
        with Ops() as ops:
            run(fn, args)
        assert ("linear_dweight" in ops.seen) != by_torch
        for i, values in enumerate(zip(run(fn, args), exact, allowed, strict=True)):
            assert_accurate(*values, f"{fn.__name__} {i}")


def test_own_product_without_onednn(monkeypatch):
    x, w, b, *_ = arguments(torch.bfloat16)
    pretend(monkeypatch, "avx512_bf16", onednn=False)
    with torch.no_grad(), Ops() as ops:
        y = lk.linear(x, w, b, "relu")
    assert "linear_forward" in ops.seen and "_linear_pointwise" not in ops.seen
    torch.testing.assert_close(y, F.relu(F.linear(x, w, b)))


def test_few_rows_stay_here(monkeypatch):
    """Our kernel computes few rows: it skips weight columns whose input is 0, oneDNN does not."""
    anew(monkeypatch)
    x, w = torch.zeros(1, 8192, dtype=torch.bfloat16), torch.randn(8192, 8192, dtype=torch.bfloat16)
    w = w.mT
    x[0, 5], w[:, 6] = 1, float("nan")
    with torch.no_grad(), Ops() as ops:
        y = lk.linear(x, w)
    assert "linear_forward" in ops.seen and torch.equal(y[0], w[:, 5])


def layers(dtype=torch.float32):
    """Each product of the library, as a function of its rows [rows, 32]."""
    torch.manual_seed(0)
    w, up, down = (torch.randn(n, m, dtype=dtype) for n, m in ((32, 32), (48, 32), (32, 48)))
    w8, scale = lk.int8_quantize(w)
    return {
        "linear": lambda x: lk.linear(x, w, None, "gelu"),
        "linear of nn": lambda x: project(x, w, None),
        "feed_forward": lambda x: lk.feed_forward(x, up, None, down, None),
        "int8 dynamic": lambda x: lk.int8_linear(x, w8, scale),
        "int8 weight_only": lambda x: lk.int8_linear(x, w8, scale, mode="weight_only"),
    }


@pytest.mark.parametrize("name", layers())
def test_no_guard_on_rows(name):
    """One graph serves all numbers of rows; the policy is asked inside of its op."""
    layer = layers()[name]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    torch._dynamo.reset()
    for compiled_with_grad in (False, True):
        graphs.clear()
        compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
        for rows in (2, 5, 17, 300, 9000):
            x, other = (torch.ones(rows, 32, requires_grad=compiled_with_grad) for _ in range(2))
            with torch.set_grad_enabled(compiled_with_grad):
                y, expected = compiled(x), layer(other)
            torch.testing.assert_close(y, expected)
            if compiled_with_grad:
                y.sum().backward()
                expected.sum().backward()
                torch.testing.assert_close(x.grad, other.grad)
            if rows == 2:
                count = len(graphs)
        assert len(graphs) == count > 0

    class Model(torch.nn.Module):
        def forward(self, x):
            return layer(x)

    rows = torch.export.Dim("rows", min=2, max=1 << 40)
    with torch.no_grad():
        program = torch.export.export(
            Model(), (torch.ones(6, 32),), dynamic_shapes=({0: rows},), strict=False
        )
    assert [(r.lower, r.upper) for r in program.range_constraints.values()] == [(2, 1 << 40)]
    torch.testing.assert_close(program.module()(torch.ones(700, 32)), layer(torch.ones(700, 32)))


def test_policy_is_asked_once_a_product(monkeypatch):
    """Not while a graph is traced, but when that graph runs."""
    asked = []

    def choose(*args):
        asked.append(args[0])
        return _product_policy.choose(*args)

    for module in (_products, sys.modules["llmos_kernels.ops.linear"]):
        monkeypatch.setattr(module, "choose", choose)
    x, w = torch.randn(128, 64), torch.randn(64, 64)
    for call in (lambda: lk.linear(x, w), lambda: project(x, w, None)):
        call()
        assert asked == ["forward"]
        asked.clear()
    x.requires_grad_()
    w.requires_grad_()
    for call, forward, backward in (
        (lambda: lk.linear(x, w), ["forward"], ["dinput", "dweight"]),
        (
            lambda: lk.feed_forward(x, w, None, w, None),
            ["forward", "forward"],
            ["dinput", "dinput_activation", "dweight", "dweight"],
        ),
    ):
        y = call()
        assert asked == forward
        asked.clear()
        y.sum().backward()
        assert sorted(asked) == backward
        asked.clear()
    with torch.no_grad():
        program = torch.export.export(lk.nn.Linear(64, 64), (x,), strict=False)
    assert not asked
    program.module()(x)
    assert len(asked) == 1


def test_tables():
    """Each entry has its fields, and one that has not is refused with the file's name."""
    for kind in ("cpu", "gpu"):
        assert _product_policy._entries(kind)
        for entry in _product_policy._entries(kind):
            assert {*entry["measured"]} == {"machine", "commit"}
    assert _product_policy.table(torch.float64, CPU).rules[LAYER] == ()


def test_traced_products_of_gpus_are_those_of_the_table():
    """A graph for CUDA records torch's plain products, which is right while they are cuBLAS's
    whatever their size and GPU. An entry that says otherwise must be asked when the graph runs, as
    on CPUs."""
    plain = {"forward", "dinput", "dweight"}
    everywhere = {"rows": [0, None], "macs": [0, None], "gpu": None, "arch": None}
    found = set()
    for entry in _product_policy._entries("gpu"):
        assert entry["direction"] in plain and entry["provider"] == _product_policy.CUBLAS
        assert {field: entry[field] for field in everywhere} == everywhere
        found.add((entry["direction"], entry["dtype"]))
    assert found == {(d, t) for d in plain for t in ("float32", "bfloat16", "float16")}


def test_every_size_counts(monkeypatch):
    """The first entry whose ranges hold rows, MACs, depth and width answers."""
    (entry, *_) = _product_policy.read(tuned.FOLDER / "cpu" / "products.json", "cpu")
    anywhere = dict.fromkeys(("rows", "macs", "vendor", "family", "isa", "amx", "threads"))
    entry |= anywhere | {"torch_library": None, "direction": "forward", "dtype": "float32"}
    entries = [
        entry | {"provider": "onednn", "depth": [64, 128], "width": [1, 32]},
        entry | {"provider": "mkl", "macs": [10, None], "rows": [2, 5]},
    ]
    anew(monkeypatch)
    monkeypatch.setattr(_product_policy, "_entries", lambda kind: entries)

    def choose(rows, depth, width):
        return _product_policy.choose("forward", torch.float32, CPU, rows, depth, width)

    assert choose(1, 64, 31) == choose(9, 127, 1) == "onednn"
    assert choose(4, 128, 31) == choose(2, 64, 32) == "mkl"
    assert choose(5, 128, 31) == choose(2, 2, 2) == choose(1, 63, 1) == "ours"


def test_threads_count_when_a_product_asks(monkeypatch):
    """A caller may change torch's threads after the table was read."""
    (entry, *_) = _product_policy.read(tuned.FOLDER / "cpu" / "products.json", "cpu")
    anywhere = dict.fromkeys(("rows", "macs", "vendor", "family", "isa", "amx", "torch_library"))
    entry |= anywhere | {"direction": "forward", "dtype": "float32"}
    entries = [
        entry | {"provider": "onednn", "threads": [3, 5]},
        entry | {"provider": "mkl", "threads": 4},
    ]
    anew(monkeypatch)
    monkeypatch.setattr(_product_policy, "_entries", lambda kind: entries)
    found = []
    for threads in (2, 3, 4, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(_product_policy.choose("forward", torch.float32, CPU, 8, 8, 8))
    assert found == ["ours", "onednn", "mkl", "onednn"]


def test_malformed_table(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"format": 1, "products": [{"direction": "forward"}]}')
    with pytest.raises(ValueError, match=r"table\.json"):
        _product_policy.read(path, "cpu")
    path.write_text('{"format": 2, "products": []}')
    with pytest.raises(ValueError, match="format 2"):
        _product_policy.read(path, "cpu")
    path.write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"table\.json: KeyError"):
        _product_policy.read(path, "cpu")
    (right, *_) = _product_policy.read(tuned.FOLDER / "cpu" / "products.json", "cpu")
    wrong = {"dtype": "bfloat61", "rows": [8, 4], "macs": [5, 5], "provider": "mlk", "depth": 8}
    for field, value in wrong.items():
        path.write_text(json.dumps({"format": 1, "products": [right | {field: value}]}))
        with pytest.raises(ValueError, match=r"table\.json"):
            _product_policy.read(path, "cpu")


@onednn
def test_compiled():
    x, w, b, w2, b2 = arguments(torch.bfloat16)

    def block(x):
        return lk.feed_forward(x, w, b, w2, b2)

    with torch.no_grad():
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("level", ["avx512", "avx512_bf16", "amx"])
def test_project(level, monkeypatch):
    """A plain linear layer uses our GEMM or torch's, whichever is faster at its size and dtype."""
    tiles = level == "amx"
    pretend(monkeypatch, level, tiles, tiles)
    small, large = torch.randn(6, 64), torch.randn(1024, 512)
    for x, dtype, by_ours in (
        (small, torch.float32, False),
        (large, torch.float32, not tiles),
        (large[:64], torch.float32, True),
        (small, torch.bfloat16, True),
        (large, torch.bfloat16, level != "avx512_bf16" or not HAS_ONEDNN),
        (large, torch.float16, True),
    ):
        x = x.to(dtype)
        w = torch.randn(512, x.shape[1], dtype=dtype)
        with torch.no_grad(), Ops() as ops:
            y = project(x, w, None)
        assert ("linear_forward" in ops.seen) == by_ours, (x.shape, dtype)
        torch.testing.assert_close(y, F.linear(x, w), rtol=0.1, atol=0.1)


def test_what_env_says(monkeypatch):
    pretend(monkeypatch, "amx", True, True)
    said = "\n".join(environment.describe())
    assert "torch's MKL: 64 or more rows, 2^26 or more MACs" in said
    pretend(monkeypatch, "avx512_bf16")
    assert "MKL" not in "\n".join(environment.describe())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inner", [1, 2, 15, 31, 32, 33, 63, 96, 127, 130, 260])
def test_whole_numbers(inner, dtype):
    """Products of integers are exact but for one rounding: a missing or extra element shows."""
    generator = testing.generator(inner)

    def whole(*shape):
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    for rows, outer in ((5, 17), (16, 64), (17, 1), (31, 33), (33, 128), (97, 130), (260, 40)):
        x, w, dz = whole(rows, inner), whole(outer, inner), whole(rows, outer)
        y, _ = _products.linear_forward(x, w, None, NONE, 0.0, None, False)
        dx, _ = _products.linear_dinput(dz, w, None, NONE, 0.0, None)
        dw, db = _products.linear_dweight(dz, x, True)
        x, w, dz = x.double(), w.double(), dz.double()
        pairs = (y, x @ w.mT), (dx, dz @ w), (dw, dz.mT @ x), (db, dz.sum(0))
        for name, (actual, exact) in zip(("y", "dx", "dw", "db"), pairs, strict=True):
            assert torch.equal(actual, exact.to(dtype)), (name, rows, outer)


@onednn
def test_tiles_are_left_as_they_were():
    """torch's products give the same bits after ours: the AMX tile configuration is restored."""
    x, w, *_ = arguments(torch.bfloat16)
    x = x[0]
    before, ours = F.linear(x, w), _products.linear_forward(x, w, None, NONE, 0.0, None, False)[0]
    heads = x.view(1, 8, -1, 65)[..., :64]
    attention = F.scaled_dot_product_attention(heads, heads, heads)
    for _ in range(3):
        _products.linear_forward(x[:33], w, None, NONE, 0.0, None, False)
        assert torch.equal(F.linear(x, w), before)
        lk.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        assert torch.equal(F.scaled_dot_product_attention(heads, heads, heads), attention)
        assert torch.equal(_products.linear_forward(x, w, None, NONE, 0.0, None, False)[0], ours)


def test_malformed_rules_are_left_out(tmp_path, monkeypatch):
    """A foreign file, or measured times under the name of rules, change no answer but warn."""
    anew(monkeypatch)
    before = _product_policy.choose("forward", torch.float32, CPU, 8, 8, 8)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "products-times.json").write_text('{"format": 1, "products": [{}]}')
    (tmp_path / "cpu" / "products-deep.json").write_text("[" * 200_000)
    monkeypatch.setenv("LLMOS_TUNED", str(tmp_path))
    anew(monkeypatch)
    with pytest.warns(RuntimeWarning, match="its rules are not used") as caught:
        assert _product_policy.choose("forward", torch.float32, CPU, 8, 8, 8) == before
    assert len(caught) == 2
