"""The command line: ``python -m llmos_kernels env | verify | bench | inspect | tune | demo``."""

import argparse
import os
import sys
from pathlib import Path

import torch

from llmos_kernels._tools import environment


def env(_: argparse.Namespace) -> int:
    """Print versions, devices, the build, and which source file has each op's kernel."""
    print("\n".join(environment.describe()))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Compare every op with the float64 reference, or the installed files with their wheel."""
    from llmos_kernels._tools import verify

    return 0 if (verify.files() if args.files else verify.ops()) else 1


def inspect(args: argparse.Namespace) -> int:
    """Print registers, memory and instructions of every Triton kernel, compiled ahead of time."""
    try:
        from llmos_kernels._tools import inspect
    except ImportError as e:
        print(f"inspect needs Triton: {e}", file=sys.stderr)
        return 2
    dtype = getattr(torch, args.dtype) if args.dtype else None
    inspect.print_table(args.arch, dtype, args.kernels)
    return 0


def tune(args: argparse.Namespace) -> int:
    """Measure launch settings on this GPU; write those that are faster than the launch rules."""
    if not torch.cuda.is_available():
        raise ValueError("tune measures a CUDA GPU, and torch finds none")
    try:
        from llmos_kernels._tools import tune
    except ImportError as e:
        print(f"tune needs rich and Triton: {e}", file=sys.stderr)
        return 2
    dtypes = [getattr(torch, name) for name in args.dtype]
    return 0 if tune.tune_this_gpu(args.op, dtypes, args.output, args.jobs) else 130


def bench(args: argparse.Namespace) -> int:
    """Run a source tree's benchmark suites with pinned threads; flags are theirs and pytest's."""
    from llmos_kernels._tools import bench

    return bench.run(args.arguments)


def demo(_: argparse.Namespace) -> int:
    """Swap a model in place, compare outputs and times: a sentence encoder, or a small model."""
    from llmos_kernels._tools import demo

    return demo.run()


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
                "--kernels", default="*", help="a pattern of kernel names, such as 'norm.*'"
            )
        if command is tune:
            ops, dtypes = ("layer_norm", "attention", "linear", "int8"), ("bfloat16", "float16")
            sub.add_argument("--op", nargs="+", choices=ops, default=ops)
            sub.add_argument("--dtype", nargs="+", choices=(*dtypes, "float32"), default=dtypes)
            sub.add_argument(
                "--output", type=Path, help="the JSON file to write; by default in tuned/"
            )
            cores = os.cpu_count() or 1
            sub.add_argument(
                "--jobs", type=int, default=cores, help="processes that compile beforehand; 0: none"
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
