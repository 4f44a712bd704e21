"""Define what ``gpu.py`` runs: slices of steps, each with an estimate of its seconds.

The estimates are for a GPU of compute capability 9.0 and 16 CPU cores; no GPU has checked them yet.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def compute_capability() -> str:
    """Return TORCH_CUDA_ARCH_LIST, or that of the first GPU here, or "9.0" where there is none."""
    if arch := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return arch
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        seen = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        seen = []
    return seen[0] if seen else "9.0"


#: The compute capability that is built for.
ARCH = compute_capability()
#: The pack of the GPU machine, which is not in the package.
PACK = ROOT / "build" / "gpu-pack"
#: Libraries that ``gpu_carry`` brought along.
PEERS = ROOT / "build" / "gpu-peers"
#: The folders that a result depends on; benchmarks do not depend on tests.
MEASURED = ("llmos_kernels", "csrc", "benchmarks")
TESTED = (*MEASURED, "tests")


@dataclass(frozen=True)
class Step:
    """A command, and how its outcome is judged."""

    name: str
    seconds: int  # An estimate; the limit is what the call has left.
    command: Sequence[str | Path]
    env: dict = field(default_factory=dict)
    folders: Sequence[str] = TESTED
    goes_on: bool = False  # True if it is partial at the time limit, and the next call resumes it.
    keeps: Sequence[str] = ()  # Files that are deleted when sources have changed.
    resume: str | None = None  # The file that is deleted once it has passed.
    always: bool = False  # True if its result lies outside of OUT, and is lost with the machine.
    product: Path | None = None  # It runs again if this file is missing, though it has passed.


ABOUT = """
import json, sys, torch
sys.path.insert(0, "benchmarks")
import machine
from llmos_kernels._tools import environment
from llmos_kernels._triton.runtime import kernel_pack
device = "cuda" if torch.cuda.is_available() else "cpu"
about = {"env": list(environment.describe()), "torch": torch.__version__}
about["machine"] = machine.name(device)
if device == "cuda":
    about |= {"arch": kernel_pack.arch_of(0), "copy GB/s": machine.copy_rate(device, 2**31)}
print("\\n".join(about["env"]))
json.dump(about, open(sys.argv[1], "w"), indent=1)
"""

INSPECT = """
import json, sys, torch
from llmos_kernels._tools import inspect
arch = "sm_%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "sm_90"
dtype = torch.bfloat16
rows = inspect.table(arch, dtype) if len(sys.argv) == 2 else []
rows = [{"kernel": str(r.launch), "arch": arch, "registers": r.registers, "spills": r.spills,
         "shared": r.shared, "wgmma": r.wgmma} for r in rows]
json.dump(rows, open(sys.argv[1], "w"), indent=1)
print(len(rows), "kernels,", sum(r["spills"] > 0 for r in rows), "spill")
"""

#: Tests that run in a slice of their own.
_STRESS = ("test_stress.py", "test_large.py")
#: Tests that are not run with the others: the extension is built, wheels are for other machines.
_NOT_HERE = (
    "test_cpu_levels.py",
    "test_sanitize.py",
    "test_wheels.py",
    "test_build.py",
    *_STRESS,
    "test_gpu_slices.py",
    "test_gpu_resume.py",
    "test_gpu_carry.py",
)
_INT8 = ("test_int8.py", "test_int8_linear.py")
_PACKED = ("test_kernels.py", "test_ops.py", "test_attention.py", "test_int8.py", "test_layers.py")
#: Tests that compile for any GPU.
_NEED_NO_GPU = (
    "compiles_within_limits",
    "products_compile",
    "test_sm_90",
    "compiled_ahead",
    "test_inspect",
)
#: Tests of every kernel on small shapes, forward and backward.
_SMALL = "same_bits_on_every_repeat"
_RACECHECKED = (
    f"{_SMALL} and (layer_norm-plain or linear-gelu or attention-causal or embedding-two)"
)


#: The steps that a new kind of machine should run first.
_FIRST = ("tests", "pack", "required", "memcheck")


def _test(name: str) -> str:
    """Return the path of a file below ``tests``, by its name alone.

    Raises:
        FileNotFoundError: There is none of that name: pytest's ``--ignore`` would not say so.
    """
    found = sorted((ROOT / "tests").rglob(name))
    if len(found) != 1:
        raise FileNotFoundError(f"{len(found)} files in tests are named {name}")
    return str(found[0].relative_to(ROOT))


def slices(out: Path, rehearse: bool, carried: bool = False) -> dict[str, list[Step]]:
    """Return the slices by name, the most valuable first; steps write to ``out``.

    ``carried`` says that the extension and the pack are there, compiled.
    """
    alone = {
        "ops-forward": _benchmark(out, "ops-forward", rehearse),
        "tune": _tune(out, rehearse, "bfloat16"),
        "tests": _tests(out, rehearse, carried),
        "sanitizer": _sanitizer(rehearse),
        "cuda": _cuda(out, rehearse),
        "ops-backward": _benchmark(out, "ops-backward", rehearse),
        "models": _benchmark(out, "models", rehearse),
        "stress": [
            _pytest(
                out,
                "stress",
                240,
                [*map(_test, _STRESS), *_chosen(rehearse, "threads or memory")],
            ),
        ],
        "tune-float16": _tune(out, rehearse, "float16"),
    }
    named = {step.name: step for steps in alone.values() for step in steps}
    prepared = _prepared(out, carried)
    ordered = {"first": [named[name] for name in _FIRST], **alone}
    return {name: [*prepared, *steps] for name, steps in ordered.items()}


def _prepared(out: Path, carried: bool) -> list[Step]:
    """Return the steps that every slice needs on a new machine."""
    env = {"LLMOS_BUILD_EXT": "1", "LLMOS_BUILD_PACK": "0", "TORCH_CUDA_ARCH_LIST": ARCH}
    about: list[str | Path] = [sys.executable, "-c", ABOUT, out / "about.json"]
    return [
        Step("build", 10 if carried else 100, [*_CARRY, "build"], env, always=True),
        Step("about", 15, about, always=True),
    ]


_CARRY = [sys.executable, "tools/gpu_session/gpu_carry.py"]


def _python(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def _pytest(out: Path, name: str, seconds: int, arguments, **options) -> Step:
    """Return a step of tests, whose outcomes go to tests.json."""
    command = _python(*arguments, f"--junitxml={out / name}.xml")
    env = {"OMP_WAIT_POLICY": "passive", **options.pop("env", {})}
    return Step(name, seconds, command, env, **options)


def _chosen(rehearse: bool, expression: str) -> list[str]:
    return ["-k", expression] if rehearse else []


def _workers(rehearse: bool) -> tuple[list[str], dict]:
    """Return options for several processes on one GPU: most of the time goes into compiling."""
    if rehearse or importlib.util.find_spec("xdist") is None:
        return [], {}
    return ["-n", str(os.cpu_count())], {"OMP_NUM_THREADS": "1"}


def _tests(out: Path, rehearse: bool, carried: bool) -> list[Step]:
    several, env = _workers(rehearse)
    ignored = [f"--ignore={_test(name)}" for name in _NOT_HERE]
    suite = ["tests", *ignored, *several, "-k", f"not {' and not '.join(_NEED_NO_GPU)}"]
    again = [*map(_test, _PACKED), *several]
    pack = [*_CARRY, "pack", "--jobs", str(os.cpu_count())]
    if rehearse:
        suite = [_test("test_kernels.py"), "-k", "layer_norm-2d and not every_backend"]
        again = [_test("test_kernels.py"), "-k", "layer_norm-2d and guard"]
        pack = [*_CARRY, "pack", "--jobs", "1", "--modules", "gemm.activation"]
    helpers = Path(_test("pack_session.py")).parent
    folders = (".", "benchmarks", helpers, "tools/gpu_session")
    path = os.pathsep.join(str(ROOT / name) for name in folders)
    packed = {"LLMOS_PACK": "on", "LLMOS_GPU_PACK": str(PACK), "PYTHONPATH": path}
    index = PACK / f"sm_{ARCH.replace('.', '')}.json"
    required = packed | {"LLMOS_PACK": "require"}
    inspect: list[str | Path] = [sys.executable, "-c", INSPECT, out / "inspect.json"]
    inspect += ["none"] * rehearse
    return [
        _pytest(out, "tests", 170, suite, env=env),
        Step("pack", 5 if carried else 45, pack, {}, MEASURED, product=index),
        _pytest(out, "packed", 75, ["-p", "gpu_pack", *again], env=env | packed),
        Step("required", 20, [sys.executable, "tools/gpu_session/gpu_pack.py"], required),
        Step("inspect", 30, inspect, {}, MEASURED),
    ]


_BENCHMARKS = {
    "ops-forward": (["bench_ops.py", "bench_int8.py"], "forward,inference"),
    "ops-backward": (["bench_ops.py", "bench_int8.py"], "backward,forward+backward,training"),
    "models": (["bench_models.py"], None),
}


def _cuda(out: Path, rehearse: bool) -> list[Step]:
    """Return steps for CUDA C++ alone: tests, each tool of the sanitizer, and the policy file."""
    env = {"LLMOS_CUDA": "cpp", "LLMOS_SKIP_TRITON": "1"}
    files = [*map(_test, ("test_kernels.py", *_INT8))]
    small = f"({_SMALL} and (norm or embedding)) or outliers_and_weight_only or same_integers"
    chosen, measure = f"({small}) and not cpu and not emulated", "benchmarks/cuda_rows.py"
    rows: list[str | Path] = [sys.executable, measure, out / "cuda-rows.json"]
    if rehearse:
        files, chosen = files[:1], "layer_norm-2d and same_bits"
        rows = [sys.executable, "-c", f"import runpy; runpy.run_path({measure!r})"]
    tests = [*files, "-k", chosen if rehearse else "not opcheck"]
    names = ("memcheck", "racecheck", "initcheck", "synccheck")
    commands = dict.fromkeys(names, _python(*files, "-k", chosen))
    return [
        _pytest(out, "cuda", 90, tests, env=env),
        *_tooled(commands, 50, rehearse, "cuda-", env),
        Step("cuda-rows", 60, rows, {}, MEASURED),
    ]


def _benchmark(out: Path, name: str, rehearse: bool) -> list[Step]:
    """Return a step of benchmarks, which resumes where it was stopped."""
    files, directions = _BENCHMARKS[name]
    # Another torch than CI's may warn of things that make no time wrong.
    arguments: list[str | Path] = [*(f"benchmarks/{file}" for file in files), "-W", "default"]
    arguments += ["--directions", directions] if directions else []
    if rehearse:
        arguments += ["--quick", "--op", "layer_norm,encoder_layers", "--dtypes", "float32"]
        arguments += ["--providers", "kernel,eager", "--busy"]
    arguments += ["--resume", out / f"{name}.jsonl", "--benchmark-json", out / f"{name}.new.json"]
    step = Step(
        name,
        330,
        _python(*arguments),
        {"PYTHONPATH": f"{ROOT}{os.pathsep}{PEERS}"},
        MEASURED,
        goes_on=True,
        keeps=(f"{name}.jsonl", f"{name}.json"),
        resume=f"{name}.jsonl",
    )
    return [step]


#: Estimates of seconds for one dtype; half of them is compiling on 16 cores.
_TUNED = {"layer_norm": 25, "attention": 160, "linear": 50, "int8": 40}


def _tune(out: Path, rehearse: bool, dtype: str) -> list[Step]:
    """Return a tuning step for each op; all write to one table."""
    steps = []
    for op, seconds in _TUNED.items():
        command = [sys.executable, "-m", "llmos_kernels", "tune", "--op", op, "--dtype", dtype]
        command += ["--help"] if rehearse else ["--output", str(out / "tuned.json")]
        name = f"tune-{op}-{dtype}"
        steps.append(Step(name, seconds, command, {}, MEASURED, goes_on=True))
    return steps


def _tool(name: str) -> list[str]:
    """Return compute-sanitizer's command; without it, a command that fails and says so."""
    home = os.environ.get("CUDA_HOME")
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    folders += [f"{home}/bin"] if home else []
    found = [p for f in folders if (p := Path(f, "compute-sanitizer")).is_file()]
    if not found:
        text = f"compute-sanitizer is in none of {os.pathsep.join(folders)}"
        return [sys.executable, "-c", f"import sys; sys.exit({text!r})"]
    options = ["--target-processes", "all", "--error-exitcode", "97", "--print-limit", "20"]
    return [str(found[0]), "--tool", name, *options]


def _sanitizer(rehearse: bool) -> list[Step]:
    """Return a run without a tool, which compiles the kernels, and one with each tool."""
    shown = "layer_norm-2d and same_bits" if rehearse else None
    tests = lambda chosen: _python(_test("test_kernels.py"), "-k", shown or chosen)
    steps = [Step("untooled", 60, tests(_SMALL))]
    tools = {
        "memcheck": _SMALL,
        "racecheck": _RACECHECKED,
        "initcheck": _RACECHECKED,
        "synccheck": _SMALL,
    }
    return [*steps, *_tooled({k: tests(v) for k, v in tools.items()}, 70, rehearse)]


def _tooled(
    commands: dict[str, list],
    seconds: int,
    rehearse: bool,
    prefix: str = "",
    env: dict | None = None,
) -> list[Step]:
    """Return a step for each tool of compute-sanitizer with its command."""
    steps = []
    for name, command in commands.items():
        # Without this torch's allocator hides where tensors end.
        alone = name in ("memcheck", "initcheck")
        more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if alone else {}
        tool = [] if rehearse else _tool(name)
        steps.append(Step(f"{prefix}{name}", seconds, [*tool, *command], {**(env or {}), **more}))
    return steps
