"""The command line: ``python -m llmos_kernels env | verify | bench | inspect | tune | demo``."""

import argparse
import os
import sys
from pathlib import Path

import torch

from llmos_kernels._tools import environment

TUNED_OPS = ("layer_norm", "attention", "linear", "int8")
HALF_DTYPES = ("bfloat16", "float16")


def env(_: argparse.Namespace) -> int:
    """Print versions, devices, the build, and which source file has each op's kernel."""
    print("\n".join(environment.describe()))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Compare every op with the float64 reference, or the installed files with their wheel."""
    from llmos_kernels._tools import verify

    return 0 if (verify.files() if args.files else verify.ops()) else 1


def inspect(args: argparse.Namespace) -> int:
    """Print registers, memory and instructions of every GPU kernel, compiled ahead of time."""
    try:
        from llmos_kernels._tools import inspect, inspect_cuda
    except ImportError as e:
        print(f"inspect needs Triton: {e}", file=sys.stderr)
        return 2
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if not args.kernels.startswith("cuda:"):
        inspect.print_table(args.arch, dtype, args.kernels)
    inspect_cuda.print_table(args.arch, args.kernels)
    return 0


def tune(args: argparse.Namespace) -> int:
    """Measure launch settings on this GPU, or our matrix products beside torch's on this CPU."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("tune --device cuda measures a CUDA GPU, and torch finds none")
    only = {"cpu": {"op": args.op, "jobs": args.jobs}, "cuda": {"seconds": args.seconds}}[device]
    for name, value in only.items():
        if value is not None:
            raise ValueError(f"--{name} is not for --device {device}, got {value}")
    if device == "cpu":
        return _tune_cpu(args)
    try:
        from llmos_kernels._tools import tune
    except ImportError as e:
        print(f"tune needs rich and Triton: {e}", file=sys.stderr)
        return 2
    jobs = (os.cpu_count() or 1) if args.jobs is None else args.jobs
    dtypes = [getattr(torch, name) for name in args.dtype or HALF_DTYPES]
    return 0 if tune.tune_this_gpu(args.op or TUNED_OPS, dtypes, args.output, jobs) else 130


def _tune_cpu(args: argparse.Namespace) -> int:
    try:
        from llmos_kernels._tools import tune_products
    except ImportError as e:
        print(f"tune needs rich: {e}", file=sys.stderr)
        return 2
    dtypes = [getattr(torch, name) for name in args.dtype or (*HALF_DTYPES, "float32")]
    seconds = 100.0 if args.seconds is None else args.seconds
    return 0 if tune_products.tune_this_cpu(dtypes, args.output, seconds) else 130


def bench(args: argparse.Namespace) -> int:
    """Run a source tree's benchmark suites with pinned threads; flags are theirs and pytest's."""
    from llmos_kernels._tools import bench

    return bench.run(args.arguments)


def demo(_: argparse.Namespace) -> int:
    """Swap a model in place, compare outputs and times: a sentence encoder, or a small model."""
    from llmos_kernels._tools import demo

    return demo.run()


def _add_tune_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--device", choices=("cpu", "cuda"), help="by default the GPU, if there is one"
    )
    sub.add_argument("--op", nargs="+", choices=TUNED_OPS, help="of the GPU; by default all")
    sub.add_argument(
        "--dtype",
        nargs="+",
        choices=(*HALF_DTYPES, "float32"),
        help="by default all on a CPU, those of 16 bits on a GPU",
    )
    sub.add_argument("--output", type=Path, help="the JSON file to write; by default in tuned/")
    sub.add_argument(
        "--jobs", type=int, help="processes that compile for the GPU beforehand; 0: none"
    )
    sub.add_argument("--seconds", type=float, help="about how long to measure the CPU, 100")


def main() -> int:
    """Run the command that the arguments name; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llmos_kernels")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (env, verify, bench, inspect, tune, demo):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(run=command)
        if command is verify:
            sub.add_argument(
                "--files", action="store_true", help="compare the installed files with their wheel"
            )
        if command is inspect:
            sub.add_argument("--arch", default="sm_90", help="sm_80, 86, 89, 90, 100 or 120")
            sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
            sub.add_argument(
                "--kernels", default="*", help="a pattern of kernel names: 'norm.*', 'cuda:*'"
            )
        if command is tune:
            _add_tune_arguments(sub)
        if command is bench:
            flags = "--quick --op --providers --dtypes --directions --resume --busy, and pytest's"
            sub.add_argument("arguments", nargs="*", metavar="flag", help=flags)
    given = sys.argv[1:]
    if given[:1] == ["bench"] and given[1:2] not in (["--help"], ["-h"]):
        args = argparse.Namespace(run=bench, arguments=given[1:])
    else:
        args = parser.parse_args()
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except ValueError as e:
        parser.error(str(e))
    except BrokenPipeError:  # The reader has seen enough: env | head.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
