"""Whether ours is slower than it was, beside torch eager in the same run; times alone say nothing.

    python benchmarks/gate.py

The rows of ``bench --quick`` are compared with ``results/<machine>/quick*.json``, several runs, between
which ratios differ by more than within one: the lowest counts. A row that seems to have lost is measured
once more, and the better of the two counts.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import machine
import torch

from llmos_kernels import _bench

HERE = Path(__file__).resolve().parent
#: What a ratio may lose besides its interval.
MARGIN = 0.1


def ratios(path: Path) -> dict[str, tuple[float, float]]:
    """By row, the interval of eager's time over ours."""
    found = json.loads(path.read_text())["benchmarks"]
    ours = (b for b in found if b["params"]["provider"] == "kernel")
    return {b["group"]: tuple(b["extra_info"]["vs_eager_ci"]) for b in ours}


def lowest(runs: Sequence[dict]) -> dict[str, tuple[float, float]]:
    """Of each row the interval of the run in which it is lowest."""
    rows = dict.fromkeys(row for found in runs for row in found)
    return {row: min(found[row] for found in runs if row in found) for row in rows}


def lost(now: dict, before: dict) -> dict[str, str]:
    """The rows whose ratio is lower than it was, even by the upper end of its interval."""
    return {
        row: f"{row}: {high:.2f} times eager at the most, was {before[row][0]:.2f} at the least"
        for row, (_, high) in now.items()
        if row in before and high < before[row][0] * (1 - MARGIN)
    }


def measured(folder: Path, name: str, *arguments: str) -> dict:
    path = folder / f"{name}.json"
    code = _bench.run(["--quick", "--benchmark-json", str(path), *arguments])
    if code or not path.exists():
        raise SystemExit(f"the benchmarks ended with {code}")
    return ratios(path)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    folder = HERE / "results" / machine.name("cuda" if torch.cuda.is_available() else "cpu")
    before = lowest([ratios(path) for path in sorted(folder.glob("quick*.json"))])
    if not before:
        raise SystemExit(f"no baseline: bench --quick --benchmark-json {folder}/quick.json")
    with tempfile.TemporaryDirectory() as folder:
        suspects = lost(measured(Path(folder), "first"), before)
        if suspects:
            again = lost(measured(Path(folder), "second"), before)
            suspects = {row: text for row, text in again.items() if row in suspects}
    print("\n".join(suspects.values()))
    print(f"{len(suspects)} of {len(before)} rows are slower than they were")
    return 1 if suspects else 0


if __name__ == "__main__":
    sys.exit(main())
