"""Run the numerical tests for every ISA of the CPU kernels and with other seeds: hours.

    python tests/seeds.py [--seeds 0 1 2] [--levels NAME ...] [--out FILE]

For each ISA torch and its libraries are limited to the same one. Results are appended to FILE, and
runs that it already has are skipped. Triton's interpreter does not depend on the ISA, so its tests
run for the last only.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from llmos_kernels import _C

TESTS = Path(__file__).parent
FILES = (
    "attention",
    "attention_masks",
    "attention_tiles",
    "dropout",
    "embedding",
    "int8",
    "int8_linear",
    "kernels",
    "layers",
    "mha",
    "nn",
    "ops",
    "products",
    "properties",
    "quantize",
    "swap",
    "swap_sequential",
    "swap_kept",
    "swap_rules",
    "swap_speed",
    "transformers",
    "transformers_int8",
    "transformers_models",
    "transformers_swap",
)
#: The ISA of ATen, MKL and oneDNN on a CPU of each level. On CPUs that are not Intel's, MKL heeds
#: MKL_CBWR alone, and of its values COMPATIBLE alone: else it always uses AVX2 and FMA.
TORCH = {
    "baseline": ("default", "SSE4_2", "COMPATIBLE", "SSE41"),
    "avx2": ("avx2", "AVX2", "", "AVX2"),
    "avx512": ("avx512", "AVX512", "", "AVX512_CORE"),
    "avx512_bf16": ("avx512", "AVX512", "", "AVX512_CORE_BF16"),
    "amx": ("avx512", "AVX512", "", "DEFAULT"),
}


def commit() -> str:
    """Return a description of the sources. If it changes, all tests run again."""
    command = ["git", "-C", TESTS.parent, "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(level: str, seed: int, triton: bool) -> dict:
    """Run the tests once and return a row: pytest's last line and the tests that failed."""
    names = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
    env = os.environ | {"LLMOS_CPU_LEVEL": level, "OMP_WAIT_POLICY": "passive"}
    env |= {name: isa for name, isa in zip(names, TORCH[level], strict=True) if isa}
    if not triton:
        env["LLMOS_SKIP_TRITON"] = "1"
    files = [str(path) for name in FILES for path in TESTS.rglob(f"test_{name}.py")]
    chosen = "not compiles and not every_backend" + " and not triton and not tiles" * (not triton)
    options = ["-q", "-n", str(os.cpu_count()), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, f"--seed={seed}", "-k", chosen, *files],
        cwd=TESTS.parent,
        env=env,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    again = [int(n) for line in lines for n in re.findall(r"(\d+) judged again, and passed", line)]
    if done.returncode not in (0, 1):  # pytest was interrupted or could not start.
        output = done.stdout[-2000:] + done.stderr[-2000:]
        raise SystemExit(f"{level}, seed {seed}: pytest returned {done.returncode}\n{output}")
    return {
        "commit": commit(),
        "level": level,
        "seed": seed,
        "triton": triton,
        "result": lines[-1],
        "judged_again": sum(again),
        "failed": failed,
        "seconds": round(time.perf_counter() - start),
    }


def main() -> int:
    """Run what FILE lacks and print a line for each run; return 1 if any test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    levels = _C.cpu_levels()
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--levels", nargs="+", choices=levels, default=levels, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("build/seeds.jsonl"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = [json.loads(s) for s in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {(r["level"], r["seed"]): r for r in found if r["commit"] == commit()}
    failures = 0
    for seed in args.seeds:
        for level in args.levels:
            if (level, seed) not in known:
                triton = level == args.levels[-1]
                known[level, seed] = run(level, seed, triton)
                with args.out.open("a") as out:
                    print(json.dumps(known[level, seed]), file=out)
            r = known[level, seed]
            print(
                f"{level:12} seed {seed}: {r['result'].strip('= ')};"
                f" {r['judged_again']} judged again",
                *r["failed"],
                sep="\n  ",
                flush=True,
            )
            failures += len(r["failed"])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
