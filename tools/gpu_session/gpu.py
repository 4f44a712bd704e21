"""Build, test, measure, tune and sanitize on a GPU machine, which needs no network.

    python3 tools/gpu_session/gpu.py [SLICE ...]     # make gpu SLICE=name; without one, all
    python3 tools/gpu_session/gpu.py --list
    python3 tools/gpu_session/gpu.py --merge gpu.zip ...   # results into build/results/<GPU>/

A slice is a named list of steps (``gpu_steps.py``). A call ends after 8 minutes, or after
``--seconds``. Steps run in the root of the repository and write to build/gpu; their results are
also in gpu.zip, in the folder that the variable OUT names, after each step and every 30 seconds.
The next call continues with the steps that have not passed with the same sources. If build/gpu is
gone, ``--resume-from`` names the gpu.zip of an earlier call. LLMOS_REHEARSE=1 runs small pieces of
all slices on a machine without a GPU.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gpu_archive
import gpu_carry
import gpu_merge
from gpu_carry import REHEARSE
from gpu_runner import BUDGET, GRACE, Runner
from gpu_steps import ROOT, Step, slices

#: The folder that steps write to.
WORK = ROOT / "build" / ("gpu-rehearsal" if REHEARSE else "gpu")
#: The folder of gpu.zip.
OUT = Path(os.environ.get("OUT", f"{WORK}-out")).resolve()
RESULTS = ROOT / "build" / "results"


def pending(runner: Runner, steps: list[Step], again: bool = False) -> list[Step]:
    """Return the steps to run, each once.

    Steps that always run come first, then those that are not finished, then those that failed. If
    all others have passed, none has to run.
    """
    steps = list({step.name: step for step in steps}.values())
    wanted = {step.name: again or step.always or runner.outcome(step) != "passed" for step in steps}
    if not any(wanted[step.name] for step in steps if not step.always):
        return []
    order = lambda step: (not step.always, runner.outcome(step) == "failed")
    return sorted((step for step in steps if wanted[step.name]), key=order)


def run(runner: Runner, steps: list[Step], again: bool = False) -> int:
    """Run what the budget allows and print what is left; return 1 if anything has failed."""
    left: dict[str, Step] = {}
    first = True
    for step in pending(runner, steps, again):
        if not runner.fits(step, first or step.always):
            left[step.name] = step
            continue
        if runner.run(step, again) == "partial":
            left[step.name] = step
        first &= step.always
    names = dict.fromkeys(step.name for step in steps)
    for name in (n for n in names if n in runner.rows):
        row = runner.rows[name]
        print(f"{name:14} {row['outcome']:8} rc {row.get('rc')}  {row.get('seconds')} s")
    print(f"took {runner.budget - runner.left:.0f} of {runner.budget:.0f} s")
    if left:
        always = sum(step.seconds for step in {s.name: s for s in steps if s.always}.values())
        needed = sum(map(runner.needs, left.values()))
        print(f"left for the next call: {', '.join(left)}")
        print(f"estimate of what is left: {needed:.0f} s, and {always} s in each call")
    return int(any(runner.rows.get(n, {}).get("outcome") == "failed" for n in names))


def listing(runner: Runner, table: dict[str, list[Step]]) -> str:
    """Return slices and steps with estimates of seconds and their outcomes."""
    shown = []
    for name, steps in table.items():
        shown.append(f"{name:14} {sum(s.seconds for s in steps):4} s (estimate)")
        shown += [f"  {s.name:14} {s.seconds:4} s  {runner.outcome(s)}" for s in steps]
    each = {step.name: step for steps in table.values() for step in steps}
    total = sum(step.seconds for step in each.values())
    shown.append(f"all            {total:4} s (estimate)")
    return "\n".join(shown)


def seconds(text: str) -> float:
    """Return the seconds that a call may take."""
    given = float(text)
    if not 2 * GRACE <= given < float("inf"):
        raise argparse.ArgumentTypeError(f"at least {2 * GRACE:.0f} seconds, got {text}")
    return given


def arguments(names: list[str], given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("slices", nargs="*", metavar="SLICE", help=", ".join(names))
    named = {"action": "append", "default": [], "metavar": "SLICE"}
    parser.add_argument("--slice", **named, help="the same, as an option")
    parser.add_argument("--again", action="store_true", help="run also what has passed")
    parser.add_argument("--list", action="store_true", help="slices, steps, what is done")
    parser.add_argument("--seconds", type=seconds, default=BUDGET, help="this call's time limit")
    archives = {"type": Path, "metavar": gpu_archive.NAME}
    parser.add_argument(
        "--resume-from", **archives, help="what an earlier call has left, or its folder"
    )
    parser.add_argument("--merge", nargs="+", **archives, help="merge these into build/results")
    args = parser.parse_args(given)
    args.slices += args.slice
    if unknown := {*args.slices} - {*names}:
        parser.error(f"no slice {', '.join(sorted(unknown))}, only {', '.join(names)}")
    return args


def gpu_name() -> str | None:
    """Return the name of the first GPU in the form of about.json; None without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    name = "" if done.returncode else done.stdout.partition("\n")[0]
    return re.sub(r"\W+", "-", name).lower() or None


def resume(given: Path) -> None:
    """Merge an earlier call's results into WORK, unless they are from a GPU of another name."""
    here = gpu_name()
    with gpu_archive.opened(given) as folder:
        there = gpu_merge.read(folder / "about.json").get("machine")
        if here and there and here != there:
            print(f"{given} was not resumed: it is from {there}, this GPU is {here}")
        else:
            gpu_merge.into(WORK, folder)


def main(given: list[str] | None = None) -> int:
    table = slices(WORK, REHEARSE, gpu_carry.refused() is None)
    args = arguments(list(table), given)
    try:
        for archive in args.merge or ():
            with gpu_archive.opened(archive) as folder:
                print(f"{archive}: merged into {gpu_merge.merge(folder, RESULTS)}")
        if args.resume_from:
            resume(args.resume_from)
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    if args.merge:
        return 0
    runner = Runner(
        WORK, args.seconds, save=lambda: gpu_archive.archive_folder(WORK, OUT / gpu_archive.NAME)
    )
    if args.list:
        print(listing(runner, table))
        return 0
    # Treat it as Ctrl-C, so that a step's processes end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen = args.slices or list(table)
    try:
        return run(runner, [step for name in chosen for step in table[name]], args.again)
    except KeyboardInterrupt:
        print(f"interrupted after {runner.budget - runner.left:.0f} s")
        return 130
    finally:
        runner.save()


if __name__ == "__main__":
    sys.exit(main())
