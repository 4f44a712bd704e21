"""``tune --device cpu``: what is timed and when that ends, what is written and read again."""

import json
import os
import subprocess
import sys

import pytest
import torch
from product_policies import anew

pytest.importorskip("rich")
from llmos_kernels._tools import tune_products
from llmos_kernels.ops import _cpu_facts, _product_measurements, _product_policy

if _cpu_facts.cpu().isa == "none":
    pytest.skip("the C++ extension is not built", allow_module_level=True)

SIZES = [(1, 8, 16), (4, 16, 8), (32, 16, 16)]


@pytest.fixture
def small(monkeypatch):
    """Measure three small sizes, on few weights."""
    monkeypatch.setattr(tune_products, "sizes", lambda: SIZES)
    monkeypatch.setattr(tune_products, "_POOL_ELEMENTS", 1 << 12)


def timed(monkeypatch, *found):
    """Compare nothing, but answer ``found`` again and again; return what is timed."""
    asked = []

    def compare(ours, theirs):
        ours(), theirs()
        asked.append(found[len(asked) % len(found)])
        return tune_products.Comparison(*asked[-1])

    monkeypatch.setattr(tune_products, "compare", compare)
    return asked


def test_from_measuring_to_choosing(small, tmp_path, monkeypatch):
    """The file that is written answers in the next process, for every direction and dtype."""
    monkeypatch.setenv("LLMOS_TUNED", str(tmp_path))
    dtypes = torch.float32, torch.bfloat16, torch.float16
    timed(monkeypatch, (2e-6, 1e-6, "torch"), (1e-6, 2e-6, "ours"))
    assert tune_products.tune_this_cpu(dtypes, None, 60.0)
    cpu = _cpu_facts.cpu()
    threads = torch.get_num_threads()
    name = f"{cpu.vendor}-family{cpu.family}-{cpu.isa}-{threads}threads.json"
    assert [p.name for p in (tmp_path / "cpu").iterdir()] == [name]
    table = _product_measurements.read(tmp_path / "cpu" / name)
    assert table["machine"]["threads"] == threads and table["machine"]["torch"]
    assert len(table["products"]) == 15
    assert all([p[:3] for p in g["points"]] == [[*s] for s in SIZES] for g in table["products"])
    anew(monkeypatch, tmp_path)
    for dtype in dtypes:
        measured = _product_policy.table(dtype, torch.device("cpu")).measured
        assert {*measured} == {*_product_measurements.DIRECTIONS}
        for grid in measured.values():
            assert {p.faster for p in grid.points} == {"ours", "torch"}


def test_real_times(small, monkeypatch):
    """Times are in microseconds, and each product runs."""
    monkeypatch.setattr(tune_products, "_MAX_SECONDS", 0.01)
    steps = []
    grids = tune_products.measure([torch.float32], 60.0, lambda: steps.append(1))
    assert len(grids) == 5 and len(steps) == len(SIZES)
    for grid in grids:
        _product_measurements._check_grid(grid)
        assert all(0.1 < us < 1e6 for point in grid["points"] for us in point[3:5])


def test_time_is_over(small, monkeypatch):
    """The smallest size is measured in any case."""
    timed(monkeypatch, (1e-6, 1e-6, None))
    (grid, *_) = tune_products.measure([torch.float32], 0.0)
    assert [p[:3] for p in grid["points"]] == SIZES[:1]


def test_what_is_hopeless_is_not_measured_at_larger_sizes(small, monkeypatch):
    timed(monkeypatch, (1e-3, 100e-3, "ours"))
    grids = tune_products.measure([torch.float32], 60.0)
    assert [len(grid["points"]) for grid in grids] == [1] * 5
    timed(monkeypatch, (1e-6, 100e-6, "ours"))
    assert len(tune_products.measure([torch.float32], 60.0)[0]["points"]) == len(SIZES)


def test_one_disturbed_size_is_not_hopeless(small, monkeypatch):
    timed(monkeypatch, (1e-3, 100e-3, "ours"), (1e-3, 1e-3, None), (1e-3, 1e-3, None))
    (grid, *_) = tune_products.measure([torch.float32], 60.0)
    assert len(grid["points"]) == len(SIZES)


def test_what_was_measured_before_is_kept(small, tmp_path, monkeypatch):
    path = tmp_path / "here.json"
    timed(monkeypatch, (2e-6, 1e-6, "torch"))
    assert tune_products.tune_this_cpu([torch.float32, torch.bfloat16], path, 60.0)
    timed(monkeypatch, (1e-6, 2e-6, "ours"))
    assert tune_products.tune_this_cpu([torch.float32], path, 0.0)
    grids = {
        (g["dtype"], g["direction"]): [p[5] for p in g["points"]]
        for g in _product_measurements.read(path)["products"]
    }
    assert len(grids) == 10
    assert grids["bfloat16", "forward"] == ["torch"] * 3
    assert grids["float32", "forward"] == ["ours", "torch", "torch"]


def test_a_file_of_another_machine_is_not_replaced(small, tmp_path, monkeypatch):
    path = tmp_path / "there.json"
    about = tune_products.machine() | {"torch_isa": "AVX9"}
    point = [1, 8, 16, 1.0, 2.0, "ours"]
    grid = {"direction": "forward", "dtype": "float32", "torch_library": "mkl", "points": [point]}
    _product_measurements.write(path, about, "", [grid])
    before = path.read_text()
    with pytest.raises(ValueError, match=r"torch_isa AVX9, here .*--output"):
        tune_products.tune_this_cpu([torch.float32], path, 1.0)
    assert path.read_text() == before


@pytest.mark.parametrize(
    "ours, theirs, verdict",
    [
        ([1, 1, 1], [2, 1.5, 1.2], "ours"),
        ([2, 1.2, 3], [1, 1, 1], "torch"),
        ([1, 1, 1], [2, 2, 1.1], None),
        ([1] * 6, [1.1, 1.2, 1.1, 1.3, 1.1, 1.2], "ours"),
        ([1.1, 1.2, 1.1, 1.3, 1.1, 1.2], [1] * 6, "torch"),
        ([1] * 6, [0.9, 1.1] * 3, None),
    ],
)
def test_verdict(ours, theirs, verdict):
    assert tune_products._verdict(ours, theirs) == verdict


def test_sizes():
    """Rows, depths and widths from 1 or 128 to 4096, the smallest products first."""
    sizes = tune_products.sizes()
    macs = [m * k * n for m, k, n in sizes]
    assert macs == sorted(macs) and macs[-1] == 1 << 31
    for i, least in enumerate((1, 128, 128)):
        assert {min(s[i] for s in sizes), max(s[i] for s in sizes)} == {least, 4096}


def test_interrupted(small, tmp_path, monkeypatch, capsys):
    """Ctrl-C leaves the file that was there."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_products, "compare", interrupt)
    path = tmp_path / "a.json"
    path.write_text("as it was")
    assert not tune_products.tune_this_cpu([torch.float32], path, 60.0)
    assert path.read_text() == "as it was" and "interrupted" in capsys.readouterr().out


def call(*args, **settings):
    env = os.environ | settings
    command = [sys.executable, "-m", "llmos_kernels", "tune", "--device", "cpu", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_folder_that_is_not_writable(tmp_path):
    """It is named before anything is measured."""
    (tmp_path / "file").write_text("")
    done = call(LLMOS_TUNED=str(tmp_path / "file"))
    assert done.returncode == 2 and f"cannot write to {tmp_path / 'file'}" in done.stderr


@pytest.mark.parametrize("name", [".", "products-mine.json"])
def test_name_that_is_refused(tmp_path, name):
    """A folder, or the name of a file of rules; nothing is measured or written."""
    with pytest.raises(ValueError, match="--output must name a file"):
        tune_products.tune_this_cpu([torch.float32], tmp_path / name, 60.0)
    assert not list(tmp_path.iterdir())


def test_time_that_is_refused(tmp_path):
    with pytest.raises(ValueError, match="finite, got nan"):
        tune_products.tune_this_cpu([torch.float32], tmp_path / "a.json", float("nan"))


def test_command(tmp_path):
    """The command writes a file that is read again, and ``env`` says so."""
    settings = {"LLMOS_TUNED": str(tmp_path)}
    done = call("--dtype", "float32", "--seconds", "0", **settings)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "cpu").iterdir()
    assert path.name in done.stdout.replace("\n", "")
    assert len(json.loads(path.read_text())["products"]) == 5
    env = os.environ | settings
    command = [sys.executable, "-m", "llmos_kernels", "env"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert f"{path.name} of " in done.stdout and "0 days old" in done.stdout


def test_not_built(monkeypatch):
    none = _cpu_facts.cpu()._replace(isa="none")
    monkeypatch.setattr(_cpu_facts, "cpu", lambda: none)
    with pytest.raises(ValueError, match="not built"):
        tune_products.tune_this_cpu([torch.float32], None, 1.0)
