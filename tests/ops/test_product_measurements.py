"""Measured times choose who computes a product; files of other machines and broken ones do not."""

import json
import sys
import warnings

import product_policies
import pytest
import torch
import torch.nn.functional as F
from product_policies import anew, put
from torch.utils._python_dispatch import TorchDispatchMode

import llmos_kernels as lk
from llmos_kernels._tools import environment
from llmos_kernels.ops import _cpu_facts, _product_measurements, _product_policy
from llmos_kernels.ops.linear import project
from llmos_kernels.testing import assert_accurate, cast

CPU = torch.device("cpu")
FLOAT = torch.float32
LIBRARY = _cpu_facts.torch_library(FLOAT)
POINTS = [
    [1, 128, 128, 1.0, 2.0, "ours"],
    [64, 128, 128, 3.0, 2.0, "torch"],
    [64, 1024, 128, 2.0, 2.1, None],
    [64, 1024, 1024, 2.0, 1.0, "torch"],
]


def choose(rows, depth, width, direction="forward", layer=False, dtype=FLOAT):
    return _product_policy.choose(direction, dtype, CPU, rows, depth, width, layer)


def grid(direction, points, dtype="float32", library=LIBRARY):
    return direction, dtype, library, points


def test_nearest_size_answers(tmp_path, monkeypatch):
    put(tmp_path, "a.json", [grid("forward", POINTS), grid("dweight", POINTS[:1])])
    anew(monkeypatch, tmp_path)
    assert choose(1, 128, 128) == choose(7, 100, 180) == "ours"
    assert choose(9, 128, 128) == choose(1 << 20, 90, 128) == LIBRARY
    assert choose(64, 800, 128) == choose(64, 4096, 300) == "ours", "a tie"
    assert choose(64, 800, 400) == choose(5000, 9999, 9999) == LIBRARY
    assert choose(0, 0, 0) == "ours"
    assert choose(64, 128, 128, "dweight") == "ours"
    assert choose(64, 1024, 1024, dtype=torch.float64) == "ours"


def test_whole_layers(tmp_path, monkeypatch):
    """A tie is torch's. With gradients forward and backward together decide, then each alone."""
    faster = [[8, 8, 8, 1.0, 2.0, "ours"]]
    products = [grid("layer", POINTS), grid("forward", POINTS[::-1]), grid("dinput", POINTS)]
    for direction, points in (("layer", faster), ("forward", faster)):
        mixed = [(direction, *g[1:3], points) if g[0] == direction else g for g in products]
        put(tmp_path, "a.json", mixed)
        anew(monkeypatch, tmp_path)
        has_gradients = direction == "forward"  # The other case goes by ``POINTS``.

        def layer(*sizes, asked="forward", has_gradients=has_gradients):
            answer = _product_policy.choose(asked, FLOAT, CPU, *sizes, True, has_gradients)
            opposite = _product_policy.choose(asked, FLOAT, CPU, *sizes, True, not has_gradients)
            return answer, opposite

        assert layer(1, 128, 128) == ("ours", "ours")
        assert layer(64, 1024, 128) == ("torch", "ours"), "a tie"
        by_library = "ours" if has_gradients else LIBRARY
        assert layer(64, 128, 128) == ("torch", by_library)
        assert layer(64, 128, 128, asked="dinput") == (LIBRARY, LIBRARY)
        assert layer(64, 1024, 128, asked="dinput") == ("ours", "ours")


def test_directions_without_times_go_by_rules(tmp_path, monkeypatch):
    put(tmp_path, "a.json", [grid("layer", POINTS)])
    anew(monkeypatch, tmp_path)
    rules = _product_policy.table(FLOAT, CPU).rules
    for sizes in ((64, 128, 128), (1, 2, 2)):
        by_rule = _product_policy._first(rules["dweight"], *sizes) or "ours"
        outside = _product_policy._first(rules["layer"], *sizes) is None
        assert choose(*sizes, "dweight") == by_rule
        assert choose(*sizes, "dweight", layer=True) == ("torch" if outside else by_rule)
        assert choose(*sizes, layer=True) == ("torch" if outside else by_rule)


def test_who_is_called(tmp_path, monkeypatch):
    """Every choice gives accurate results and gradients, by the library that was faster."""
    names = "forward", "dinput", "dinput_activation", "dweight", "layer"
    torch.manual_seed(0)
    args = [torch.randn(*s, requires_grad=True) for s in ((6, 16), (24, 16), (24,), (16, 24))]

    def eager(x, w, b, down):
        return F.linear(F.relu(F.linear(x, w, b)), down)

    for faster in ("ours", "torch"):
        put(tmp_path, "a.json", [grid(n, [[8, 16, 16, 1.0, 1.0, faster]]) for n in names])
        anew(monkeypatch, tmp_path)
        seen = set()

        class Ops(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None, seen=seen):
                seen.add(op.overloadpacket.__name__)
                return op(*args, **(kwargs or {}))

        def run(fn, args):
            out = fn(*args)
            return [out, *torch.autograd.grad(out.square().sum(), args)]

        def ours(x, w, b, down):
            return project(lk.linear(x, w, b, "relu"), down, None)

        with Ops():
            found = run(ours, args)
        assert ("linear_dweight" in seen) == ("linear_dinput" in seen) == (faster == "ours")
        exact = run(eager, cast(args, torch.float64))
        for values in zip(found, exact, run(eager, args), strict=True):
            assert_accurate(*values, faster)


def test_threads_of_this_moment(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    put(tmp_path, "a.json", [grid("forward", [[1, 8, 8, 2.0, 1.0, "torch"]])], threads=threads)
    put(tmp_path, "b.json", [grid("forward", [[1, 8, 8, 1.0, 2.0, "ours"]])], threads=threads + 1)
    anew(monkeypatch, tmp_path)
    try:
        assert choose(8, 8, 8) == LIBRARY
        torch.set_num_threads(threads + 1)
        assert choose(8, 8, 8) == "ours"
    finally:
        torch.set_num_threads(threads)
    assert choose(8, 8, 8) == LIBRARY


FOREIGN = {
    "vendor": "Elbrus",
    "family": 1,
    "isa": "avx3",
    "amx": "?",
    "torch_isa": "AVX3",
    "threads": 1 << 10,
}


@pytest.mark.parametrize("fact", FOREIGN)
def test_files_of_other_machines(fact, tmp_path, monkeypatch):
    """They are not used, and nobody is warned of them."""
    put(tmp_path, "a.json", [grid("forward", POINTS)], **{fact: FOREIGN[fact]})
    anew(monkeypatch, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _product_policy.table(FLOAT, CPU).measured
        assert choose(64, 1024, 1024) in ("ours", LIBRARY)


def test_library_has_to_be_the_measured_one(tmp_path, monkeypatch):
    other = "mkl" if LIBRARY != "mkl" else "onednn"
    put(tmp_path, "a.json", [grid("forward", POINTS, library=other)])
    anew(monkeypatch, tmp_path)
    assert not _product_policy.table(FLOAT, CPU).measured


def broken(**changes):
    good = product_policies.content([grid("forward", POINTS)])
    (products,) = good["products"]
    top = {k: v for k, v in changes.items() if k in good}
    return json.dumps(good | {"products": [products | changes]} | top)


BAD = {
    "not JSON": ("{", "JSONDecodeError"),
    "not text": (b"\xff\xfe", "UnicodeDecodeError"),
    "a list": ("[]", "TypeError"),
    "format": (lambda: broken(format=7), "has format 7, expected 1"),
    "launch settings": ('{"format": 1, "gpu": "A", "settings": {}}', "KeyError: 'machine'"),
    "machine": (lambda: broken(machine={"vendor": "A"}), "machine lacks"),
    "date": (lambda: broken(date="yesterday"), "yesterday"),
    "commit": (lambda: broken(commit=None), "commit None"),
    "direction": (lambda: broken(direction="sideways"), "direction 'sideways'"),
    "dtype": (lambda: broken(dtype="float31"), "dtype 'float31'"),
    "library": (lambda: broken(torch_library="eigen"), "torch_library 'eigen'"),
    "no points": (lambda: broken(points=[]), "has no points"),
    "short": (lambda: broken(points=[[1, 2]]), "ValueError"),
    "size": (lambda: broken(points=[[1, 0, 1, 1.0, 1.0, None]]), "point [1, 0, 1"),
    "time": (lambda: broken(points=[[1, 1, 1, 1.0, 0.0, None]]), "times must be above 0"),
    "faster": (lambda: broken(points=[[1, 1, 1, 1.0, 1.0, "mine"]]), "faster 'mine'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(kind, tmp_path, monkeypatch):
    """A bad file causes one warning that names it; rules answer, and models are unchanged."""
    data, words = BAD[kind]
    data = data() if callable(data) else data
    (tmp_path / "cpu").mkdir()
    path = tmp_path / "cpu" / "bad.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    layer, x = lk.nn.Linear(64, 64), torch.randn(64, 64)
    anew(monkeypatch)
    expected = layer(x), choose(64, 1024, 1024)
    anew(monkeypatch, tmp_path)
    with pytest.warns(RuntimeWarning) as caught:
        assert torch.equal(layer(x), expected[0])
    (warning,) = caught
    assert "bad.json: " in str(warning.message) and words in str(warning.message)
    assert choose(64, 1024, 1024) == expected[1]


def test_a_bad_file_beside_a_good_one(tmp_path, monkeypatch):
    put(tmp_path, "b.json", [grid("forward", POINTS)])
    (tmp_path / "cpu" / "a.json").mkdir()
    anew(monkeypatch, tmp_path)
    with pytest.warns(RuntimeWarning, match=r"a\.json: IsADirectoryError"):
        assert choose(64, 1024, 1024) == LIBRARY


def test_what_env_says(tmp_path, monkeypatch):
    put(tmp_path, "mine.json", [grid("forward", POINTS)])
    anew(monkeypatch, tmp_path)
    said = {line[:32].strip(): line for line in environment.describe()}
    assert "mine.json of 2026-01-02" in said["float32 linear forward"]
    assert "commit 0123456789ab" in said["float32 linear forward"]
    assert "faster at 2 of 4 sizes, ours at 1" in said["float32 linear forward"]
    assert "days old" in said["float32 linear forward"]
    assert said["float32 linear dweight"].endswith("(conservative rule)")


def test_traced_graphs_ask_when_they_run(tmp_path, monkeypatch):
    """One graph serves both numbers of rows, each by its own library."""
    put(tmp_path, "a.json", [grid("forward", [*POINTS[:1], *POINTS[3:]])])
    anew(monkeypatch, tmp_path)
    asked = []

    def spy(*args):
        asked.append(_product_policy.choose(*args))
        return asked[-1]

    monkeypatch.setattr(sys.modules["llmos_kernels.ops._products"], "choose", spy)
    w = torch.randn(256, 256)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: lk.linear(x, w), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for rows in (2, 500):
        x = torch.randn(rows, 256)
        torch.testing.assert_close(compiled(x), F.linear(x, w))
    assert asked == ["ours", LIBRARY]


def test_probe(monkeypatch):
    """The library is told by the time of a small product, as oneDNN itself says it."""
    native = _cpu_facts.is_onednn_product(torch.bfloat16, True)
    assert native == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (_cpu_facts.torch_library(torch.bfloat16) == "onednn") == native
    anew(monkeypatch)
    times = iter((1e-6, 20e-6))
    monkeypatch.setattr(_cpu_facts, "_least_seconds", lambda *_: next(times))
    assert not _cpu_facts.is_onednn_product(torch.bfloat16, True)
    times = iter((1e-6, 5e-6))
    assert not _cpu_facts.is_onednn_product(torch.bfloat16, True), "asked once"
    anew(monkeypatch)
    assert _cpu_facts.is_onednn_product(torch.bfloat16, True) == native


def test_probe_is_not_seen():
    """Modes of the caller neither see nor change the probe; random numbers are not drawn."""
    probe = _cpu_facts.is_onednn_product.__wrapped__
    seen = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op)
            return op(*args, **(kwargs or {}))

    expected, state = probe(torch.bfloat16, True), torch.get_rng_state()
    with Ops(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert probe(torch.bfloat16, True) == expected
    assert not seen and torch.equal(torch.get_rng_state(), state)


def test_answers_are_bounded():
    for cached in (_product_policy._answer, _product_measurements._nearest):
        assert 0 < cached.cache_info().maxsize <= 4096
