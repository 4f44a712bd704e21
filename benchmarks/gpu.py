"""On a CUDA machine without a network: build, tests, benchmarks, launch settings, sanitizers, stress.

    python3 benchmarks/gpu.py [SLICE ...]     # make gpu SLICE=name; all slices without a name
    python3 benchmarks/gpu.py --list
    python3 benchmarks/gpu.py --merge FOLDER  # what came back into benchmarks/results/<GPU>/

A call takes 8 minutes at the most. Each step leaves its outcome in the folder that OUT names at once;
the next call goes on with what has not passed with the same sources. Where OUT is empty at every call
``--resume-from`` names a copy of what an earlier one has left. LLMOS_REHEARSE=1 is for machines without
a GPU.
"""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path

import gpu_merge
from gpu_runner import Runner
from gpu_steps import ROOT, Step, slices

REHEARSE = os.environ.get("LLMOS_REHEARSE") == "1"
_DEFAULT = ROOT / "build" / ("gpu-rehearsal" if REHEARSE else "gpu")
OUT = Path(os.environ.get("OUT", _DEFAULT)).resolve()
RESULTS = ROOT / "benchmarks" / "results"


def pending(runner: Runner, steps: list[Step], again: bool = False) -> list[Step]:
    """What is to be run, each once: first what always runs, then what is not finished, then what failed."""
    steps = list({step.name: step for step in steps}.values())
    wanted = {step.name: again or step.always or runner.outcome(step) != "passed" for step in steps}
    if not any(wanted[step.name] for step in steps if not step.always):
        return []
    order = lambda step: (not step.always, runner.outcome(step) == "failed")
    return sorted((step for step in steps if wanted[step.name]), key=order)


def run(runner: Runner, steps: list[Step], again: bool = False) -> int:
    """Run what the budget allows, and say what is left. 1 if anything has failed."""
    left, first = [], True
    for step in pending(runner, steps, again):
        if not runner.fits(step, first or step.always):
            left.append(step.name)
            continue
        if runner.run(step, again) == "partial":
            left.append(step.name)
        first &= step.always
    names = dict.fromkeys(step.name for step in steps)
    for name in (n for n in names if n in runner.rows):
        row = runner.rows[name]
        print(f"{name:14} {row['outcome']:8} rc {row.get('rc')}  {row.get('seconds')} s")
    if left:
        print(f"left for the next call: {', '.join(left)}")
    return int(any(runner.rows.get(n, {}).get("outcome") == "failed" for n in names))


def listing(runner: Runner, table: dict[str, list[Step]]) -> str:
    """Slices, steps, estimates of seconds on an H200, and what is done."""
    shown = []
    for name, steps in table.items():
        shown.append(f"{name:14} {sum(s.seconds for s in steps):4} s (estimate)")
        shown += [f"  {s.name:14} {s.seconds:4} s  {runner.outcome(s)}" for s in steps]
    return "\n".join(shown)


def arguments(names: list[str], given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("slices", nargs="*", metavar="SLICE", help=", ".join(names))
    parser.add_argument("--slice", action="append", default=[], metavar="SLICE", help="the same")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--list", action="store_true", help="slices, steps, what is done")
    parser.add_argument("--resume-from", type=Path, metavar="FOLDER", help="copied to OUT first")
    parser.add_argument("--merge", type=Path, metavar="FOLDER", help="into benchmarks/results")
    args = parser.parse_args(given)
    args.slices += args.slice
    if unknown := {*args.slices} - {*names}:
        parser.error(f"no slice {', '.join(sorted(unknown))}, only {', '.join(names)}")
    return args


def main(given: list[str] | None = None) -> int:
    table = slices(OUT, REHEARSE)
    args = arguments(list(table), given)
    if args.merge:
        print(f"merged into {gpu_merge.merge(args.merge, RESULTS)}")
        return 0
    if args.resume_from:
        shutil.copytree(args.resume_from, OUT, dirs_exist_ok=True)
    runner = Runner(OUT)
    if args.list:
        print(listing(runner, table))
        return 0
    # As Ctrl-C: a step's processes end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen = args.slices or list(table)
    try:
        return run(runner, [step for name in chosen for step in table[name]], args.again)
    except KeyboardInterrupt:
        print("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
