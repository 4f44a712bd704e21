"""Write benchmark results as one page that needs no other file, and plots beside it.

    python benchmarks/report [FILES] [--output build/page.html]     # make page

Without files these are the baselines and the runs in build/results. The figure of the README,
docs/assets/headline.svg, is drawn from the baselines alone, and written if no files are given.
"""

import argparse
import json
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(BENCHMARKS)  # Python puts this folder there, not the one above it.

from report import model  # noqa: E402

ROOT = BENCHMARKS.parent
BASELINES = BENCHMARKS / "baselines"
RESULTS = ROOT / "build" / "results"
HEADLINE = ROOT / "docs" / "assets" / "headline.svg"


def is_result(path: Path) -> bool:
    """Return True if a file has benchmarks in it: runs leave other JSON beside their results."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and "benchmarks" in found


def write(paths: list[Path], output: Path, headline: Path | None) -> str:
    """Write page, plots and figure; return the tables of all machines as text.

    Raises:
        ValueError: A file is of no use, or a library is missing.
    """
    try:
        from report import headline as headlines
        from report import page, plots
    except ImportError as e:
        needed = (e.name or "matplotlib").partition(".")[0]
        raise ValueError(f"the report needs {needed}: pip install {needed}") from e
    results = model.read(paths)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page.render(results), encoding="utf-8", newline="\n")
    plots.save(results, output.parent)
    if headline is not None:
        headline.parent.mkdir(parents=True, exist_ok=True)
        headlines.save(model.read(sorted(BASELINES.glob("*.json"))), headline)
    return "\n\n".join(map(model.markdown, results.machines))


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON of bench, or baselines")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "page.html")
    args = parser.parse_args(given)
    runs = sorted(filter(is_result, RESULTS.rglob("*.json")))
    paths = args.files or [*sorted(BASELINES.glob("*.json")), *runs]
    try:
        print(write(paths, args.output, None if args.files else HEADLINE))
    except ValueError as e:
        parser.error(str(e))
    print(f"\n{args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
