"""Fail if our speed relative to torch eager has fallen below this machine's baseline.

    python benchmarks/gate.py

The rows of ``bench --quick`` are compared with ``baselines/<machine>.json``. Only ratios to eager
in the same run are compared, never times. A row that seems slower is measured once more, and the
better of the two measurements counts. On a machine without a baseline the gate says so and passes.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import baseline
import machine
import torch

from llmos_kernels._tools import bench

#: The part of its lower end that a ratio may lose besides its interval.
MARGIN = 0.1


def ratios(path: Path) -> dict[str, tuple[float, float]]:
    """Return the interval of eager's time over ours, by row."""
    found = json.loads(path.read_text())["benchmarks"]
    ours = (b for b in found if b["params"]["provider"] == "kernel")
    return {b["group"]: tuple(b["extra_info"]["vs_eager_ci"]) for b in ours}


def lost(now: dict, before: dict) -> dict[str, str]:
    """Return the rows whose ratio fell, judged by the upper end of its interval, with what to
    say."""
    return {
        row: f"{row}: {high:.2f} times eager at the most, was {before[row][0]:.2f} at the least"
        for row, (_, high) in now.items()
        if row in before and high < before[row][0] * (1 - MARGIN)
    }


def measured(folder: Path, name: str) -> dict:
    """Return the ratios of a quick run."""
    path = folder / f"{name}.json"
    code = bench.run(["--quick", "--benchmark-json", str(path)])
    if code or not path.exists():
        raise SystemExit(f"the benchmarks ended with {code}")
    return ratios(path)


def main() -> int:
    argparse.ArgumentParser(description=__doc__.split("\n", 1)[0]).parse_args()
    name = machine.name("cuda" if torch.cuda.is_available() else "cpu")
    rows = baseline.load(baseline.path_of(name))["rows"]
    before = {row["row"]: tuple(row["gate"]) for row in rows if "gate" in row}
    if not before:
        print(f"passed: there is no baseline for {name}. To record one: make bench BENCH=--quick")
        print("twice, then python benchmarks/baseline.py build/results/*.json")
        return 0
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
