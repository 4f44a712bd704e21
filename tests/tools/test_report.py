"""The report of benchmarks: what it reads, what a browser shows of it. All times are made up."""

import copy
import html
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")
from report import __main__ as command
from report import headline, model
from report import page as pages
from report import plots as figures

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = '<script>document.title="owned"</script> $x_{$ "\' ]]> --> \ud800 \x00 漢'


def benchmark(name, provider, micros, op=None, dtype="float32", direction="forward", **info):
    """An entry with all keys that ours have, if an op is given."""
    stats = {"median": micros / 1e6}
    full = {
        "op": op,
        "size": [8, 64],
        "dtype": dtype,
        "direction": direction,
        "error_over_budget": 0.4,
        "bytes": 1_000_000,
        "median_ci": [micros * 0.98 / 1e6, micros * 1.02 / 1e6],
        "share": 0.5,
        "peak_bytes": 1 << 20,
    }
    return {
        "group": name,
        "name": f"test[{provider}]",
        "fullname": f"bench.py::test[{provider}]",
        "params": {"provider": provider},
        "stats": stats,
        "extra_info": (full if op else {}) | info,
    }


NORM, GELU, INT8 = (
    "layer_norm [8, 64] float32 forward",
    "gelu [9] bfloat16 backward",
    "int8 linear [1] bfloat16 forward + backward",
)
GOAL = {"eager": 2.0, "liger": 1.0}
BENCHMARKS = [
    benchmark(NORM, "kernel", 10, "layer_norm", goal=GOAL, vs_eager_ci=[2.4, 2.6]),
    benchmark(NORM, "eager", 25, "layer_norm"),
    benchmark(NORM, "compile", 8, "layer_norm"),
    benchmark(GELU, "kernel", 20, "gelu", "bfloat16", "backward", goal={"eager": 1.5}, FLOP=4e8),
    benchmark(GELU, "eager", 5, "gelu", "bfloat16", "backward", runs="a_kernel"),
    benchmark(INT8, "kernel", 30, relative_error=0.011),
    benchmark(INT8, "dynamic", 29.999),
]
LLMOS = {
    "machine": "test-machine",
    "torch": "2.13.0",
    "threads": 2,
    "settings": {"OMP_NUM_THREADS": "2"},
    "limits": {"copy": 45.1, "float32": 480.0, "bfloat16": 900.0},
    "state": {"load": 0.1},
    "versions": {"torch": "2.13.0"},
}


def made(benchmarks=BENCHMARKS, machine="test-machine", wrong=(), absent=None):
    content = {
        "machine_info": {"node": "node", "llmos": LLMOS | {"machine": machine}},
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "benchmarks": list(benchmarks),
        "datetime": "2026-01-02T03:04:05",
        "version": "5",
        "llmos": {"wrong": list(wrong), "absent": absent or {}},
    }
    return copy.deepcopy(content)


@pytest.fixture
def report(tmp_path):
    """Writes files and the page of them, and plots to a folder; returns the page's text."""

    def run(*contents, plots=None):
        paths = []
        for i, content in enumerate(contents):
            paths.append(tmp_path / f"{i}.json")
            paths[-1].write_text(content if isinstance(content, str) else json.dumps(content))
        page = tmp_path / "out" / "page.html"
        page.parent.mkdir(exist_ok=True)
        results = model.read(paths)
        page.write_text(pages.render(results), encoding="utf-8", newline="\n")
        if plots is not None:
            plots.mkdir(exist_ok=True)
            figures.save(results, plots)
        return page.read_text(encoding="utf-8")

    return run


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


def hostile():
    entries = [
        benchmark(HOSTILE, provider, 1 + i, HOSTILE, HOSTILE, HOSTILE, runs=HOSTILE, FLOP=10**i)
        for i, provider in enumerate(("kernel", "eager", HOSTILE, "_hidden"))
    ]
    entries[0]["extra_info"]["goal"] = {HOSTILE: 2}
    wrong = {"group": HOSTILE + "2", "provider": HOSTILE, "why": HOSTILE}
    content = made(entries, HOSTILE, [wrong], {HOSTILE: HOSTILE})
    content["machine_info"]["llmos"]["limits"][HOSTILE] = 3.0
    return content | {"datetime": HOSTILE, "commit_info": {"id": HOSTILE}}


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
    for name in ("headline", "page", "plots"):
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
    monkeypatch.setattr(figures, "MARKERS", {"float32": "o", "int8": "D"})
    plot = figures.Axes.plot
    monkeypatch.setattr(
        figures.Axes, "plot", lambda ax, *a, **k: drawn.append(a) or plot(ax, *a, **k)
    )
    rows = [
        benchmark("int8_linear", "kernel", 10, "int8_linear", FLOP=4e9, products="int8"),
        benchmark("int8_linear", "eager", 90, "int8_linear", FLOP=4e9, products="int8"),
        benchmark("linear", "kernel", 10, "linear", FLOP=4e6),
    ]
    page = report(made(rows))
    markers = [a[2] for a in drawn if len(a) == 3 and a[2] in ("o", "D")]
    assert markers == ["D", "D", "o"] and ">int8<" in page


@pytest.fixture(scope="module")
def browser():
    found = os.environ.get("CHROME") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}, and CHROME is not set")

    def run(page, *options):
        command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr"]
        done = subprocess.run(
            [*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("width", [1280, 480])
def test_a_browser_shows_it(report, browser, tmp_path, width):
    from matplotlib.image import imread

    report(made())
    shot = tmp_path / "shot.png"
    page = tmp_path / "out" / "page.html"
    browser(page, f"--screenshot={shot}", f"--window-size={width},1600")
    image = imread(shot)[..., :3]
    assert image.shape[1] == width
    assert image.std() > 0.05
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    assert ((red > 0.6) & (green < 0.2) & (blue < 0.3)).sum() > 100


SCRIPT = """{
const said = [];
const table = [...document.querySelectorAll("section.op table")][0];
const column = name => [...table.tHead.rows[0].cells].find(c => c.textContent.startsWith(name));
const shown = () => [...table.tBodies[0].rows].filter(r => !r.hidden);
const order = () => shown().map(r => r.cells[1].textContent).join();
for (const name of ["median", "median", "time over", "time over", "provider"]) {
  const header = column(name);
  header.querySelector("button").click();
  said.push(order() + " " + header.getAttribute("aria-sort"));
}
said.push(document.querySelectorAll("[aria-sort]").length);
const box = document.getElementById("filter");
box.value = "COMPILE layer_norm";
box.dispatchEvent(new Event("input"));
said.push(order(), [...document.querySelectorAll("section.op")].filter(s => !s.hidden).length);
const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
said.push(wide ? "overflows" : "fits", document.title);
document.title = said.join("; ");
}"""


def test_a_browser_sorts_and_filters(report, browser, tmp_path):
    text = report(made())
    page = tmp_path / "clicked.html"
    page.write_text(text.replace("</body>", f"<script>{SCRIPT}</script></body>"), encoding="utf-8")
    dom = browser(page, "--dump-dom", "--window-size=480,800")
    assert html.unescape(re.search("<title>(.*?)</title>", dom)[1]).split("; ") == [
        "compile,kernel,eager ascending",
        "eager,kernel,compile descending",
        "compile,eager,kernel ascending",
        "eager,compile,kernel descending",
        "compile,eager,kernel ascending",
        "1",
        "compile",
        "1",
        "fits",
        "Benchmarks: test-machine",
    ]


def test_a_browser_runs_no_name(report, browser, tmp_path):
    report(hostile())
    dom = browser(tmp_path / "out" / "page.html", "--dump-dom")
    assert "<title>Benchmarks: &lt;script&gt;" in dom
