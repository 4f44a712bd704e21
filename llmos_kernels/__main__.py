"""``python -m llmos_kernels env | verify | bench | inspect | tune | demo``."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from llmos_kernels import _environment, _files


def env(_) -> int:
    """Versions, devices, build, and which file answers for each op on each device."""
    print("\n".join(_environment.describe()))
    return 0


def verify(args) -> int:
    """Every op, dtype and device against the float64 reference; or installed files against their sums."""
    if args.files:
        found = list(_files.altered())
        print("\n".join([*found, f"{len(found)} files altered: FAIL" if found else "PASS"]))
        return 1 if found else 0
    from llmos_kernels.cases import int8
    from llmos_kernels.testing import CASES, DTYPES, worst_error

    def judge(case):
        shapes = [s for s in case.shapes if torch.Size(s).numel() > 0]
        return lambda dtype, device: max(worst_error(case, s, dtype, device) for s in shapes)

    judged = {case.name: judge(case) for case in CASES} | {"int8_linear": int8.worst_error}
    failed, start = 0, time.perf_counter()
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for name, error in judged.items():
            cells = []
            for dtype in DTYPES:
                try:
                    worst = error(dtype, device)
                    good, text = worst <= 1, f"{worst:.2f}"
                except Exception as e:
                    good, text = False, f"{type(e).__name__}: {e}"
                failed += not good
                cells.append(
                    f"{str(dtype).removeprefix('torch.')} {'PASS' if good else 'FAIL'} {text}"
                )
            print(f"{device:5} {name:28} " + "  ".join(cells), flush=True)
    print(f"error over budget, 1 or less passes; {time.perf_counter() - start:.0f} s")
    print(f"{failed} failed: FAIL" if failed else "PASS")
    return 1 if failed else 0


def inspect(args) -> int:
    """What every Triton kernel takes and is made of, compiled ahead of time."""
    try:
        from llmos_kernels import _inspect
    except ImportError as e:
        print(f"inspect needs Triton: {e}", file=sys.stderr)
        return 2
    dtype = getattr(torch, args.dtype) if args.dtype else None
    rows = _inspect.table(args.arch, dtype, args.kernels)
    print(f"kernels on {args.arch}; loads; stores in bits a thread x how many instructions")
    print("matrix: of tensor cores, x 2: done twice; waits: tiles that loops do not load ahead")
    print("regs spills  shared matrix    waits  kernel; loads; stores")
    for r in rows:
        matrix = r.matrix + f" x {r.repeated:g}" * (r.repeated > 1)
        numbers = f"{r.registers:4} {r.spills:6} {r.shared:7} {matrix:9} {len(r.waited_for):5}"
        print(f"{numbers}  {r.launch}; {r.vectors}", flush=True)
    return 0


def tune(args) -> int:
    """Measure launch settings on this GPU, and keep those that beat the rules."""
    if not torch.cuda.is_available():
        raise ValueError("tune measures a CUDA GPU, and torch finds none")
    try:
        import rich  # noqa: F401
        import triton

        from llmos_kernels import _pack, _tune, _tune_ahead
        from llmos_kernels._triton import tuned
    except ImportError as e:
        print(f"tune needs rich and Triton: {e}", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    about = {
        "gpu": name, "arch": _pack.arch_of(0), "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip
    path = args.output or tuned.folders()[0] / f"{name.replace(' ', '_')}.json"
    dtypes = [getattr(torch, name) for name in args.dtype]
    if args.jobs and not _tune_ahead.ahead(args.op, dtypes, about["arch"], args.jobs):
        print("interrupted before anything was measured")
        return 130
    done = _tune.run(args.op, dtypes, path, about)
    print(f"{'' if done else 'interrupted; what was measured is in '}{path}")
    return 0 if done else 130


def bench(args) -> int:
    """Run the benchmark suites of a source tree with pinned threads; flags are theirs and pytest's."""
    from llmos_kernels._tools import bench

    return bench.run(args.arguments)


def demo(_) -> int:
    """Swap a model in place, and compare outputs and times: a sentence encoder, or a small model."""
    from llmos_kernels._tools import demo

    return demo.run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m llmos_kernels")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (env, verify, bench, inspect, tune, demo):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(run=command)
        if command is verify:
            sub.add_argument("--files", action="store_true", help="compare files, run nothing")
        if command is inspect:
            sub.add_argument("--arch", default="sm_90", help="sm_80, 86, 89, 90, 100 or 120")
            sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
            sub.add_argument("--kernels", default="*", help="of these names: 'layer_norm*', ...")
        if command is tune:
            ops, dtypes = ("layer_norm", "attention", "linear", "int8"), ("bfloat16", "float16")
            sub.add_argument("--op", nargs="+", choices=ops, default=ops)
            sub.add_argument("--dtype", nargs="+", choices=(*dtypes, "float32"), default=dtypes)
            sub.add_argument("--output", type=Path, help="a JSON file; else tuned/ of the package")
            cores = os.cpu_count() or 1
            sub.add_argument(
                "--jobs", type=int, default=cores, help="processes that compile first; 0: none"
            )
        if command is bench:
            flags = "--quick --op --providers --dtypes --directions --resume --busy, and pytest's"
            sub.add_argument("arguments", nargs="*", metavar="flag", help=flags)
    given = sys.argv[1:]
    if given[:1] == ["bench"] and given[1:2] not in (["--help"], ["-h"]):
        args = argparse.Namespace(run=bench, arguments=given[1:])
    else:
        args = parser.parse_args()
    try:
        return args.run(args)
    except ValueError as e:
        parser.error(str(e))


if __name__ == "__main__":
    sys.exit(main())
