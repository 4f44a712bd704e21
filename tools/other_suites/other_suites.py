"""Run another project's tests with our functions and modules in place of torch's.

    python tools/other_suites/other_suites.py CHECKOUT [PYTEST ARGUMENT ...]

CHECKOUT is a folder with tests for pytest or unittest, such as PyTorch's ``test``. Those that fail
run again with torch's only_ours functions, and are listed by what that says:

    failed with torch's too    the suite, or this machine
    accepted differences       in the table below, with the reason
    new differences            of these the exit status is 1
    no longer different        entries of the table whose tests ran and passed: take them out; 1

The exit status is 2 where pytest could not run. ``CHECKOUT`` is not changed; functions and modules
are replaced in the processes of its tests alone (``other_suites_plugin.py``).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

#: A pattern of test ids, as of a shell, and why ours differs. Each reason has a test of its own.
ACCEPTED = {
    "*::test_is_causal_and_mask_fails*": (
        "all masks may be combined: attn_mask and is_causal both apply (tests/ops/test_errors.py)"
    ),
}
#: pytest's exit statuses that mean that it ran: all passed, some failed, none were there.
RAN = (0, 1, 5)


def run(checkout: Path, arguments: list[str], only: list[str] | None = None) -> dict:
    """Return which tests failed and passed with ours; or, of ``only`` these, with torch's."""
    with tempfile.TemporaryDirectory() as folder:
        results, wanted = Path(folder, "results.json"), Path(folder, "wanted.json")
        environment = os.environ | {
            "LLMOS_SUITE_RESULTS": str(results),
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        if only is not None:
            wanted.write_text(json.dumps(only))
            environment["LLMOS_SUITE_STOCK"] = str(wanted)
        pytest = [sys.executable, "-m", "pytest", "-p", "other_suites_plugin"]
        command = [*pytest, "--continue-on-collection-errors", *arguments]
        status = subprocess.run(command, cwd=checkout, env=environment).returncode
        if status not in RAN or not results.exists():
            print(f"pytest ended with status {status}", file=sys.stderr)
            raise SystemExit(2)
        return json.loads(results.read_text())


def accepted(test: str) -> str | None:
    """Return the pattern of the table that a test id matches, or None."""
    return next((pattern for pattern in ACCEPTED if fnmatchcase(test, pattern)), None)


def judge(ours: dict, stock: dict) -> dict[str, list[str]]:
    """Return the lists of the report by name, from the outcomes with ours and with torch's."""
    theirs = set(stock["failed"])
    only_ours = [test for test in ours["failed"] if test not in theirs]
    patterns = {accepted(test) for test in only_ours}
    stale = {accepted(test) for test in ours["passed"]} - patterns - {None}
    return {
        "failed with torch's too": [test for test in ours["failed"] if test in theirs],
        "accepted differences": [test for test in only_ours if accepted(test)],
        "new differences": [test for test in only_ours if not accepted(test)],
        "no longer different": sorted(pattern for pattern in stale if pattern),
    }


def main() -> int:
    """Run the suite, print the report and return the exit status."""
    parser = argparse.ArgumentParser(usage="%(prog)s CHECKOUT [PYTEST ARGUMENT ...]")
    parser.add_argument("checkout", type=Path)
    options, arguments = parser.parse_known_args()
    if not options.checkout.is_dir():
        parser.error(f"{options.checkout} is no folder")
    ours = run(options.checkout, arguments)
    stock = run(options.checkout, arguments, ours["failed"]) if ours["failed"] else {"failed": []}
    report = judge(ours, stock)
    print(f"\n{len(ours['passed'])} passed with llmos_kernels")
    for name, tests in report.items():
        print(f"{len(tests)} {name}")
        for test in tests:
            reason = ACCEPTED.get(accepted(test) or "") if name == "accepted differences" else None
            print(f"  {test}" + (f": {reason}" if reason else ""))
    return bool(report["new differences"] or report["no longer different"])


if __name__ == "__main__":
    sys.exit(main())
