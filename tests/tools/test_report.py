"""The report of benchmarks: what it reads, what a browser shows of it. All times are made up."""

import html
import json
import re
import sys

import pytest

pytest.importorskip("matplotlib")
from report import __main__ as command
from report import headline, model, rates
from report_files import (
    BENCHMARKS,
    GELU,
    HOSTILE,
    INT8,
    LLMOS,
    NORM,
    benchmark,
    hostile,
    made,
    reporter,
)


@pytest.fixture
def report(tmp_path):
    return reporter(tmp_path)


def cells(page, heading):
    """The rows of the first table after a heading, as lists of texts."""
    table = page[page.index(f"<h3>{heading}</h3>") :].partition("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table.partition("<tbody>")[2], re.DOTALL)
    return [[html.unescape(c) for c in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]


def test_headline(report):
    page = report(made())
    norm, gelu, int8 = cells(page, "Against eager")
    assert norm == ["layer_norm", "float32", "forward", "2.50", "2.50 … 2.50", "1", "0", "▼ 1"]
    assert gelu[3:] == ["▼ 0.250 behind", "0.250 … 0.250", "0", "▼ 1", "▼ 1"]
    assert int8[:4] == ["int8 linear", "bfloat16", "forward+backward", "not measured"]
    assert int8[-1] == "▼ 1"
    assert "commit 0123456789ab with changes" in page and "copy 45.10 GB/s" in page


def test_losses_come_first_and_say_so(report):
    rows = cells(report(made()), "Where a peer is ahead")
    assert [r[0] for r in rows] == ["▼ 0.250 behind", "▼ 0.800 behind", "▼ 0.999 behind"]
    assert [r[1] for r in rows] == [GELU, NORM, INT8]
    assert rows[0][2] == "eager (runs a_kernel)"
    assert "No peer is ahead" in report(made(BENCHMARKS[:2]))


def test_rows_of_an_op(report):
    page = report(made())
    ours, eager, compiled = cells(page, "Every row and provider of layer_norm")
    assert ours[1:4] == ["kernel", "10.00", "9.800 … 10.20"]
    assert ours[-1] == "met: eager 2; not measured: liger 1"
    assert eager[4] == "2.50" and compiled[4] == "▼ 0.800 behind"
    assert "missed: eager 1.5" in cells(page, "Every row and provider of gelu")[0]
    assert cells(page, "Every row and provider of int8 linear")[0][-1] == "0.011"


def test_a_wrong_result_is_marked(report):
    page = report(
        made([*BENCHMARKS[:2], benchmark(NORM, "x", 1, "layer_norm", error_over_budget=7)])
    )
    assert "▲ 7.000 wrong" in cells(page, "Every row and provider of layer_norm")[2]


def test_wrong_and_absent(report):
    wrong = {"group": NORM, "provider": "compile", "why": "error 7.1 times its budget"}
    page = report(made(wrong=[wrong], absent={"flash-attn": "needs a CUDA device"}))
    listed = cells(page, "No time: a wrong result")
    assert listed == [["compile", NORM, "✗ error 7.1 times its budget"]]
    assert "<dt>flash-attn</dt><dd>needs a CUDA device</dd>" in page
    assert len(cells(page, "Every row and provider of layer_norm")) == 2


def test_later_files_win(report):
    later = made(
        [benchmark(NORM, "compile", 40, "layer_norm"), benchmark("new", "eager", 1, "new")]
    )
    older = made(
        wrong=[{"group": "new", "provider": "eager", "why": "gone"}], absent={"eager": "gone"}
    )
    page = report(older, later)
    assert cells(page, "Every row and provider of layer_norm")[2][1:5:3] == ["compile*", "4.00"]
    assert cells(page, "Every row and provider of new")
    assert "gone" not in page and page.count('class="machine"') == 1


def test_machines_stay_apart(report, tmp_path):
    page = report(made(), made(BENCHMARKS[:2], "other"), plots=tmp_path)
    assert page.count('class="machine"') == 2
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', page)
    assert {a or b for a, b in used} <= set(ids)


def test_little_is_needed(report):
    little = [
        {"name": "test_x[eager-8]", "params": {"provider": "eager"}, "stats": {"median": 2}},
        {"name": "test_x[kernel-8]", "params": {"provider": "kernel"}, "stats": {"median": 1}},
        {"name": "test_y", "params": None, "stats": {"median": 1}},
    ]
    page = report({"benchmarks": little})
    assert [r[0] for r in cells(page, "Every row and provider of test_x")] == ["[8]", "[8]"]
    assert "does not say how it was measured" in page and "test_y" not in page


@pytest.mark.parametrize(
    "value",
    [None, "text", [], {}, -1, 0, True, float("nan"), 10**400, [1], [0, 2], ["a", 1], HOSTILE],
)
def test_any_value_is_survived(report, tmp_path, value):
    broken = made(BENCHMARKS[:2])
    for entry in broken["benchmarks"]:
        keys = [*entry["extra_info"], "FLOP", "goal", "vs_eager_ci", "versions", "runs", "tokens/s"]
        entry["extra_info"] = dict.fromkeys(keys, value)
    broken["machine_info"]["llmos"] = dict.fromkeys(LLMOS, value)
    broken |= {"commit_info": value, "datetime": value, "llmos": {"wrong": value, "absent": value}}
    sorted_by = re.findall(r'data-value="([^"]*)"', report(broken, plots=tmp_path))
    assert not {"nan", "inf", "None"}.intersection(sorted_by)


def test_names_are_escaped(report, tmp_path):
    page = report(hostile(), plots=tmp_path)
    assert page.count("<script") == 1
    assert "&lt;script&gt;document" in page


def test_nothing_comes_from_elsewhere(report):
    page = report(made())
    assert not re.search(r"https?://|@import|<link|<img|<iframe|\bsrc=", page)


def test_same_bytes(report, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert report(made(), plots=first) == report(made(), plots=second)
    for name in ("speedup.png", "roofline.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_plots_without_eager_or_limits(report, tmp_path):
    content = made([benchmark(NORM, "kernel", 10)])
    content["machine_info"]["llmos"]["limits"] = {}
    report(content, plots=tmp_path)
    assert (tmp_path / "speedup.png").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "not JSON"),
        ("[]", "not a pytest-benchmark file"),
        ("[" * 100_000, "not JSON"),
        ({"benchmarks": {}}, "not a pytest-benchmark file"),
        (made([]), "no benchmark has a parameter 'provider'"),
        (made([benchmark(NORM, "", 1)]), "no benchmark has a parameter 'provider'"),
        (made([{"name": "test", "params": {"rows": 2}}, 3]), "no benchmark has a parameter"),
        (made([benchmark(NORM, "eager", -1)]), "has no median for 'eager'"),
        (made([*BENCHMARKS, BENCHMARKS[0]]), "has the provider 'kernel' twice"),
    ],
)
def test_bad_files_are_named(report, content, why):
    with pytest.raises(ValueError, match=rf"1\.json: .*{why}"):
        report(made(), content)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: cannot be read"):
        model.read([tmp_path / "none.json"])
    with pytest.raises(ValueError, match="no files"):
        model.read([])


def test_matplotlib_is_asked_for(monkeypatch, tmp_path, capsys):
    for name in ("axes", "headline", "page", "plots", "rates"):
        monkeypatch.delitem(sys.modules, f"report.{name}", raising=False)
        monkeypatch.delattr(f"report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "0.json").write_text(json.dumps(made()))
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "0.json")])
    said = capsys.readouterr().err
    assert "the report needs matplotlib: pip install matplotlib" in said


def test_command(monkeypatch, tmp_path, capsys):
    """Without files: baselines and runs, and the figure from baselines alone; other JSON is passed
    over."""
    for name in ("BASELINES", "RESULTS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(command, name, tmp_path / name)
    monkeypatch.setattr(command, "HEADLINE", tmp_path / "assets" / "headline.svg")
    row = {"us": {"kernel": 5.0, "eager": 10.0}, "ratio": [1.9, 2.1]}
    cpu = {"name": "A CPU", "family": "7", "model": "8", "isa": "avx2"}
    (tmp_path / "BASELINES" / "this.json").write_text(
        json.dumps(
            {
                "machine": "this",
                "cpu": cpu,
                "threads": 2,
                "runs": [{"date": "2026-01-02", "commit": "01", "dirty": False, "quick": False}],
                "rows": [{"row": name, **row} for name in headline.ROWS],
            }
        )
    )
    (tmp_path / "RESULTS" / "run.json").write_text(json.dumps(made()))
    (tmp_path / "RESULTS" / "about.json").write_text("{}")
    page = tmp_path / "page.html"
    assert command.main(["--output", str(page)]) == 0
    assert page.read_text().count('class="machine"') == 2
    assert {p.suffix for p in tmp_path.iterdir() if p.is_file()} == {".html", ".png"}
    figure = command.HEADLINE.read_bytes()
    assert b"A CPU, family 7, model 8, ISA avx2, 2 threads" in figure
    assert figure.count(b"2.00 x") == headline.BARS and b"test-machine" not in figure
    (tmp_path / "RESULTS" / "run.json").unlink()
    assert command.main(["--output", str(page)]) == 0
    assert command.HEADLINE.read_bytes() == figure
    assert (
        "test-machine" not in page.read_text()
        and "| minilm | inference |" in capsys.readouterr().out
    )


def test_bars_are_shared(tmp_path):
    """Among machines, and what one does not need goes to the others."""
    results = model.Results([])
    for name, rows in (("few", [*headline.ROWS][:2]), ("many", headline.ROWS), ("none", ())):
        machine = model.Machine(name)
        for row in rows:
            entries = {p: model.ProviderTime(p, 1.0, {}, 0) for p in ("kernel", "eager")}
            machine.rows[row] = model.ReportRow(row, "op", "float32", "inference", entries)
        results.machines.append(machine)
    assert [(m.name, len(rows)) for m, rows in headline.shares(results)] == [
        ("many", 8),
        ("few", 2),
    ]


def test_int8_has_a_roof_of_its_own(report, monkeypatch):
    """Its rows are not drawn as float32, whose roof they pass, whatever dtype goes in and comes
    out."""
    drawn = []
    monkeypatch.setattr(rates, "MARKERS", {"float32": "o", "int8": "D"})
    plot = rates.Axes.plot
    monkeypatch.setattr(
        rates.Axes, "plot", lambda ax, *a, **k: drawn.append(a) or plot(ax, *a, **k)
    )
    rows = [
        benchmark("int8_linear", "kernel", 10, "int8_linear", FLOP=4e9, products="int8"),
        benchmark("int8_linear", "eager", 90, "int8_linear", FLOP=4e9, products="int8"),
        benchmark("linear", "kernel", 10, "linear", FLOP=4e6),
    ]
    page = report(made(rows))
    markers = [a[2] for a in drawn if len(a) == 3 and a[2] in ("o", "D")]
    assert markers == ["D", "D", "o"] and ">int8<" in page
