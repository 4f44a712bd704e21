"""Record and read baselines: the times of one kind of machine, one line a row.

    python benchmarks/baseline.py build/results/*.json

This writes ``benchmarks/baselines/<machine>.json`` for each machine in the files. Times come from
full runs, and from ``--quick`` runs where no full run has the row. The interval that the gate
compares with is the lowest of the quick runs: ratios differ more between runs than within one.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "baselines"
#: What is copied of a run's description of its machine; of ``limits`` the highest of all runs.
_OF_MACHINE = ("gpu", "cpu", "torch", "threads", "limits")


def path_of(machine: str) -> Path:
    """Return the path of a machine's baseline."""
    return FOLDER / f"{machine}.json"


def load(path: Path) -> dict:
    """Return a baseline; one without rows where the file does not exist."""
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def save(baseline: dict, path: Path) -> None:
    """Write a baseline with one line a row."""
    head = json.dumps({k: v for k, v in baseline.items() if k != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in baseline["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n ]\n}}\n')


def make(results: Sequence[dict]) -> dict[str, dict]:
    """Return a baseline for each machine in the results of pytest-benchmark, by its name."""
    made: dict[str, dict] = {}
    for result in sorted(results, key=lambda r: (not _about(r)["quick"], r["datetime"])):
        about, commit = _about(result), result["commit_info"]
        baseline = made.setdefault(about["machine"], {"machine": about["machine"], "runs": []})
        limits = baseline.get("limits", {})
        baseline |= {key: about[key] for key in _OF_MACHINE if key in about}
        baseline["limits"] = {
            key: max(value, limits.get(key, value)) for key, value in about["limits"].items()
        }
        baseline["runs"].append(
            {
                "date": result["datetime"][:19],
                "commit": commit.get("id", "")[:12],
                "dirty": commit.get("dirty", False),
                "quick": about["quick"],
            }
        )
        rows = baseline.setdefault("rows", {})
        for name in {b["group"] for b in result["benchmarks"]} & rows.keys():
            rows[name]["us"] = {}  # Times of different runs are not comparable.
        for benchmark in result["benchmarks"]:
            _add(rows, benchmark, about["quick"])
    return {name: b | {"rows": [*b["rows"].values()]} for name, b in made.items()}


def _about(result: dict) -> dict:
    return result["machine_info"]["llmos"]


def _add(rows: dict[str, dict], benchmark: dict, quick: bool) -> None:
    """Add one provider's time to its row."""
    info, provider = benchmark["extra_info"], benchmark["params"]["provider"]
    row = rows.setdefault(benchmark["group"], {"row": benchmark["group"], "us": {}})
    row["us"][provider] = info["us"]
    if provider != "kernel":
        return
    row |= {key: info[key] for key in ("bytes", "FLOP", "products") if key in info}
    if "vs_eager_ci" in info:
        row["ratio"] = info["vs_eager_ci"]
        if quick:
            row["gate"] = min(row.get("gate", info["vs_eager_ci"]), info["vs_eager_ci"])


def as_result(baseline: dict) -> dict:
    """Return a baseline as a result of pytest-benchmark, for the report."""
    last = baseline["runs"][-1]
    benchmarks = []
    for row in baseline["rows"]:
        known = {key: row[key] for key in ("bytes", "FLOP", "products") if key in row}
        known |= {"vs_eager_ci": row["ratio"]} if "ratio" in row else {}
        benchmarks += [
            {
                "group": row["row"],
                "params": {"provider": provider},
                "stats": {"median": us / 1e6},
                "extra_info": known,
            }
            for provider, us in row["us"].items()
        ]
    about = {key: baseline[key] for key in ("machine", *_OF_MACHINE) if key in baseline}
    return {
        "machine_info": {"llmos": about},
        "commit_info": {"id": last["commit"], "dirty": last["dirty"]},
        "datetime": last["date"],
        "benchmarks": benchmarks,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON of bench --benchmark-json")
    for name, baseline in make(
        [json.loads(p.read_text()) for p in parser.parse_args().files]
    ).items():
        save(baseline, path_of(name))
        print(f"{len(baseline['rows'])} rows in {path_of(name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
