"""One run on a CUDA machine without a network tells all: build, tests, kernels, benchmarks.

`make gpu` calls it with that machine's python3. Every step has a time limit, goes on after a
failure of another, and leaves its outcome in the folder that OUT names: summary.json, tests.json,
ops.json, inspect.json. Rehearse it on a machine without a GPU with LLMOS_REHEARSE=1.
"""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(os.environ.get("OUT", ROOT / "build" / "gpu")).resolve()
REHEARSE = os.environ.get("LLMOS_REHEARSE") == "1"
BUDGET = 470  # Seconds in all: make gpu stays inside 8 minutes.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

ABOUT = """
import json, sys, torch, triton
from llmos_kernels import _environment, testing
about = {"env": list(_environment.describe()), "torch": torch.__version__, "triton": triton.__version__}
if torch.cuda.is_available():
    a = torch.empty(2**30, device="cuda")
    b = torch.empty_like(a)
    (seconds,) = testing.interleaved([lambda: b.copy_(a)], rounds=10, seconds=0.02)
    about["copy GB/s"] = round(2 * a.nbytes / seconds / 1e9)
print("\\n".join(about["env"]))
json.dump(about, open(sys.argv[1], "w"), indent=1)
"""

INSPECT = """
import json, sys, torch
from llmos_kernels import _inspect
arch = "sm_%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "sm_90"
rows = [{"kernel": str(r.launch), "arch": arch, "registers": r.registers, "spills": r.spills,
         "shared": r.shared, "wgmma": r.wgmma} for r in _inspect.table(arch, torch.bfloat16)]
json.dump(rows, open(sys.argv[1], "w"), indent=1)
print(len(rows), "kernels,", sum(r["spills"] > 0 for r in rows), "spill")
"""


def steps():
    """(name, seconds at the most, command)."""
    arch = (
        {} if REHEARSE else {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0")}
    )
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    yield "build", 120, build, {"LLMOS_BUILD_EXT": "1", **arch}
    yield "about", 60, [sys.executable, "-c", ABOUT, OUT / "about.json"], {}
    few = ["--deselect", "tests/test_cpu_levels.py"]
    chosen = ["-k", "layer_norm" if REHEARSE else "not compiles_within_limits"]
    yield "tests", 240, [*PYTEST, "tests", *few, *chosen, f"--junitxml={OUT / 'tests.xml'}"], {}
    yield "inspect", 60, [sys.executable, "-c", INSPECT, OUT / "inspect.json"], {}
    some = ["-k", "test_call"] if REHEARSE else []
    yield (
        "benchmarks",
        180,
        [*PYTEST, "benchmarks", "--save", OUT, "--benchmark-disable", *some],
        {},
    )


def junit_as_json(xml: Path, target: Path) -> None:
    """Every test that did not pass, with its message, and the counts."""
    suite = ET.parse(xml).getroot().find("testsuite")
    bad = [
        {
            "test": f"{c.get('classname')}::{c.get('name')}",
            "kind": r.tag,
            "text": (r.text or "")[-4000:],
        }
        for c in suite.iter("testcase")
        for r in c
        if r.tag in ("failure", "error")
    ]
    counts = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
    target.write_text(json.dumps({**counts, "bad": bad}, indent=1))
    xml.unlink()


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    start, summary = time.monotonic(), []
    for name, limit, command, extra in steps():
        left = BUDGET - (time.monotonic() - start)
        began = time.monotonic()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **extra}
        print(f"== {name} (at most {min(limit, left):.0f} s)", flush=True)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, timeout=max(min(limit, left), 1),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            rc, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as e:
            rc, output = "time limit", (e.stdout or b"").decode(errors="replace")
        print(output[-3000:], flush=True)
        row = {"step": name, "rc": rc, "seconds": round(time.monotonic() - began, 1)}
        summary.append({**row, "tail": output[-6000:]})
        (OUT / "summary.json").write_text(json.dumps(summary, indent=1))
        if (OUT / "tests.xml").exists():
            junit_as_json(OUT / "tests.xml", OUT / "tests.json")
    for row in summary:
        print(f"{row['step']:12} rc {row['rc']}  {row['seconds']} s")
    return 0 if all(row["rc"] == 0 for row in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
