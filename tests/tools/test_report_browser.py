"""What a browser shows of the report."""

import html
import os
import re
import shutil
import subprocess

import pytest

pytest.importorskip("matplotlib")
from report_files import hostile, made, reporter

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture
def report(tmp_path):
    return reporter(tmp_path)


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
