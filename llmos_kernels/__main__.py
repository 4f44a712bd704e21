"""The command line: ``python -m llmos_kernels env | verify | bench | inspect | tune | demo``."""

import argparse
import os
import sys
from pathlib import Path

import torch

import llmos_kernels
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


def report(args) -> int:
    """Make a page of what bench --benchmark-json has written."""
    from llmos_kernels import _report

    results = _report.read(args.files)
    _report.write(results, args.output, args.plots)
    print("\n\n".join([*map(_report.markdown, results.machines), str(args.output)]))
    return 0


def bench(args) -> int:
    """Run the suites of the source tree with pinned threads; flags are theirs and pytest's."""
    from llmos_kernels import _bench

    return _bench.run(args.arguments)


def demo(_) -> int:
    """A small model swapped in place: the report, the outputs, the time."""
    from torch import nn

    from llmos_kernels.testing import interleaved

    class Block(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.norm, self.dense, self.dropout = nn.LayerNorm(d), nn.Linear(d, d), nn.Dropout(0.1)

        def forward(self, states, residual):
            return self.norm(self.dropout(self.dense(states)) + residual)

    class Model(nn.Module):
        def __init__(self, d=256):
            super().__init__()
            self.first, self.block, self.last = nn.LayerNorm(d), Block(d), nn.RMSNorm(d)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.block(x, x))

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(8, 128, 256)
    with torch.inference_mode():
        before = model(x)
        print(llmos_kernels.optimize(model, inputs=(x,)))
        after = model(x)
        (swapped,) = interleaved([lambda: model(x)])
        llmos_kernels.restore(model)
        (stock,) = interleaved([lambda: model(x)])
    print(f"\nlargest difference of the outputs: {(after - before).abs().max():.1e}")
    print(f"a batch: {stock * 1e6:.0f} us before, {swapped * 1e6:.0f} us after")
    return 0


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
            sub.set_defaults(arguments=[])
            made = sub.add_subparsers(metavar=f"report | {flags}").add_parser(
                "report", help=report.__doc__
            )
            made.set_defaults(run=report)
            made.add_argument("files", nargs="+", type=Path, help="JSON of pytest-benchmark")
            made.add_argument("--output", type=Path, default=Path("page.html"))
            made.add_argument("--plots", type=Path, help="a folder for PNGs")
    given = sys.argv[1:]
    if given[:1] == ["bench"] and given[1:2] not in (["report"], ["--help"], ["-h"]):
        args = argparse.Namespace(run=bench, arguments=given[1:])
    else:
        args = parser.parse_args()
    try:
        return args.run(args)
    except ValueError as e:
        parser.error(str(e))


if __name__ == "__main__":
    sys.exit(main())
