"""Mutation testing: plant known faults, each of which the tests must detect. ``make mutants``

    python tests/mutants.py [--only NAME ...]

Each fault is applied alone to a copy of the sources; then the tests that should detect it run until
one fails. A run of all faults writes the table of which test detected which to
``build/results/mutants.md``.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "build" / "results" / "mutants.md"


@dataclass(frozen=True)
class Mutant:
    """A fault, as a replacement in one source file, and the tests that should detect it."""

    name: str
    path: str
    old: str  # Occurs exactly once in the file.
    new: str
    tests: tuple[str, ...]  # Arguments of pytest.


KERNELS = ("tests/kernels/test_kernels.py", "tests/ops/test_ops.py")
NORMS = ("tests/kernels/test_kernels.py", "-k", "norm")
CUDA = ("tests/kernels/test_emulated_cuda.py", *NORMS[:1], "-k", "emulated or norm")
MUTANTS = (
    Mutant(
        "drop the mask",
        "llmos_kernels/_triton/attention/scores.py",
        "    return tl.load(mask, inside, 0) != 0\n",
        "    return tl.load(mask, inside, 0) >= 0\n",
        (
            "tests/kernels/test_kernels.py",
            "tests/ops/test_attention_masks.py",
            "-k",
            "attention or mask",
        ),
    ),
    Mutant(
        "wrong divisor",
        "csrc/cpu/kernels/layer_norm_kernel.cpp",
        "const float value = square.total() / float(d) -",
        "const float value = square.total() / float(d + 1) -",
        NORMS,
    ),
    Mutant(
        "bf16 statistics",
        "llmos_kernels/_triton/norm/layer_norm.py",
        "        mean += shift\n        v -= mean\n",
        "        mean = (mean + shift).to(tl.bfloat16).to(tl.float32)\n        v -= mean\n",
        NORMS,
    ),
    Mutant(
        "skip the last tile",
        "llmos_kernels/_triton/gemm/gemm.py",
        "    for start in range(0, length, BLOCK_K):",
        "    for start in range(0, length - BLOCK_K + 1, BLOCK_K):",
        ("tests/kernels/test_kernels.py", "-k", "linear or feed_forward"),
    ),
    Mutant(
        "int32 offset",
        "llmos_kernels/_triton/norm/layer_norm.py",
        "    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]",
        "    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]",
        ("tests/kernels/test_offsets.py", "-k", "offsets_past_two"),
    ),
    Mutant(
        "swap dweight and dbias",
        "csrc/cpu/host/layer_norm.cpp",
        "return {dresidual, dx, dweight, dbias};",
        "return {dresidual, dx, dbias, dweight};",
        NORMS,
    ),
    Mutant(
        "eps outside the root",
        "llmos_kernels/_triton/norm/layer_norm.py",
        "    rstd = 1 / tl.sqrt(variance + eps)\n    tl.store(stats + row, rstd, row < N)",
        "    rstd = 1 / (tl.sqrt(variance) + eps)\n    tl.store(stats + row, rstd, row < N)",
        NORMS,
    ),
    Mutant(
        "stale VNNI weight",
        "llmos_kernels/nn/int8.py",
        "if source is None or source[0] is not weight or source[1] != state:",
        "if source is None:",
        ("tests/ops/test_int8_linear.py", "tests/swap/test_quantize.py"),
    ),
    Mutant(
        "dropout mask not replayed",
        "llmos_kernels/_triton/norm/layer_norm_backward.py",
        "dropout_factors(seed, row, first_col, threshold",
        "dropout_factors(seed, row + 1, first_col, threshold",
        NORMS,
    ),
    Mutant(
        "outlier column missed",
        "llmos_kernels/_triton/int8/linear.py",
        "            inside = at_place < tl.load(index) - start\n",
        "            inside = at_place < tl.load(index) - start - 1\n",
        ("tests/ops/test_int8.py", "tests/ops/test_int8_linear.py"),
    ),
    Mutant(
        "scale of the wrong row",
        "csrc/cpu/kernels/int8_kernel.cpp",
        "F32) * input_scale[r];",
        "F32) * input_scale[r ? r - 1 : 0];",
        ("tests/ops/test_int8.py", "tests/ops/test_int8_linear.py"),
    ),
    Mutant(
        "missing tail store",
        "csrc/cpu/kernels/vec.h",
        "  for (; i < d; ++i) body(Part<float, 0>{}, i);\n",
        "  for (; i + 1 < d; ++i) body(Part<float, 0>{}, i);\n",
        NORMS,
    ),
    Mutant(
        "missing barrier",
        "csrc/cuda/kernel.h",
        "partial[i * kWarp + warp] = v[i];\n  }\n  __syncthreads();\n",
        "partial[i * kWarp + warp] = v[i];\n  }\n",
        CUDA,
    ),
    Mutant(
        "wrong lane in a shuffle",
        "csrc/cuda/kernel.h",
        "__shfl_xor_sync(kAllLanes, v[i], with)",
        "__shfl_xor_sync(kAllLanes, v[i], with ^ 1)",
        CUDA,
    ),
    Mutant(
        "tail not masked",
        "csrc/cuda/row.h",
        "      if (first + k * step < d) body(first + k * step, held[k]);\n",
        "      body(first + k * step, held[k]);\n",
        CUDA,
    ),
)


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command with additional environment variables and capture its output."""
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )


def build(tree: Path) -> None:
    """Build the C++ extension of ``tree``. Unchanged object files are not compiled again."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = run(*command, cwd=tree, LLMOS_BUILD_EXT="1", LLMOS_EMULATE="1")
    if done.returncode:
        raise SystemExit(f"the copy cannot be built:\n{done.stderr[-4000:]}")


def caught_by(tree: Path, tests: tuple[str, ...]) -> str | None:
    """Return the first of ``tests`` that fails in ``tree``, or None if all pass."""
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    done = run(
        *(sys.executable, "-m", "pytest", *options, *tests),
        cwd=tree,
        OMP_WAIT_POLICY="passive",
        PYTHONPATH=str(tree),
    )
    if done.returncode < 0:  # The process crashed; faulthandler has printed the test.
        found = re.search(r"/(tests/\S+)\", line \d+ in (test_\w+)", done.stdout + done.stderr)
        return f"{found[1]}::{found[2]}" if found else f"signal {-done.returncode}"
    if done.returncode not in (0, 1):
        raise SystemExit(f"{tests} could not run:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    found = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - |$)", done.stdout, re.MULTILINE)
    return found[1] if found else None


def catcher(tree: Path, mutant: Mutant) -> str | None:
    """Return the first test that fails with the fault and passes without it, or None."""
    path = tree / mutant.path
    original = path.read_text()
    if original.count(mutant.old) != 1:
        count = original.count(mutant.old)
        raise SystemExit(f"{mutant.name}: expected one place in {mutant.path}, found {count}")
    is_cpp = mutant.path.startswith("csrc")
    path.write_text(original.replace(mutant.old, mutant.new))
    if is_cpp:
        build(tree)
    test = caught_by(tree, mutant.tests)
    path.write_text(original)
    if is_cpp:
        build(tree)
    if test is not None and caught_by(tree, (test,)) is not None:
        raise SystemExit(f"{test} also fails without the fault")
    return test


def main() -> int:
    """Test all or the given mutants; return 1 if any is not detected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[m.name for m in MUTANTS], metavar="NAME")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "copy"
        listed = run("git", "ls-files", "-z", cwd=ROOT).stdout.split("\0")[:-1]
        for name in listed:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        build(tree)
        for mutant in MUTANTS:
            if not args.only or mutant.name in args.only:
                start = time.perf_counter()
                rows.append((mutant, catcher(tree, mutant)))
                taken = time.perf_counter() - start
                print(f"{mutant.name:26} {rows[-1][1] or 'SURVIVES'} ({taken:.0f} s)", flush=True)
    if not args.only:
        lines = [f"| {m.name} | `{m.path}` | `{test or 'none: it survives'}` |" for m, test in rows]
        head = (
            "# Planted faults\n\nThe test is the first that fails.\n\n| fault | in | detected by |"
        )
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text("\n".join([head, "|---|---|---|", *lines]) + "\n")
    survivors = sum(test is None for _, test in rows)
    print(f"{survivors} of {len(rows)} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
