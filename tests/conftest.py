"""Options, fixtures and the summary of all tests; corrections to Triton's interpreter."""

import os
from collections import Counter

import torch

HAS_GPU = torch.cuda.is_available()
# Read when the package is imported: C++ allocates outputs through the dispatcher, where tests can
# surround them with guard bands.
os.environ["LLMOS_DISPATCHED_OUTPUTS"] = "1"
# Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402

from llmos_kernels._core import numerics  # noqa: E402
from llmos_kernels.ops import _product_policy  # noqa: E402
from llmos_kernels.testing import InaccurateError, judge_again  # noqa: E402

DEVICES = ["cpu"] + ["cuda"] * HAS_GPU


def pytest_addoption(parser):
    parser.addoption(
        "--seed", type=int, default=0, help="shift the random seeds of every test and proof"
    )


def pytest_configure(config):
    # On a CPU without AVX-512 torch does not use oneDNN for bfloat16.
    if os.environ.get("ONEDNN_MAX_CPU_ISA") in ("SSE41", "AVX2"):
        torch.backends.mkldnn.set_flags(False)
    numerics.shift = config.getoption("seed")
    original = torch.manual_seed
    torch.manual_seed = lambda seed: original(numerics.shifted(seed))
    if numerics.shift:
        import hypothesis

        hypothesis.core.global_force_seed = numerics.shift


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test that misses an error budget again, with other random numbers: it may be chance."""
    try:
        return (yield)
    except InaccurateError as missed:
        if hasattr(pyfuncitem.obj, "hypothesis"):
            raise
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

        def test():
            torch.manual_seed(0)
            pyfuncitem.obj(**arguments)

        judge_again(test, missed)
        pyfuncitem.user_properties.append(("judged again", str(missed)))
        return True


#: The files of which ``make test-quick`` runs the tests, but for those named in ``NOT_QUICK``.
QUICK = {
    f"test_{name}"
    for name in (
        *("attention", "attention_masks", "dropout", "embedding", "int8", "int8_linear", "layers"),
        *("mha", "nn", "ops", "products", "properties", "quantize", "swap", "swap_sequential"),
        *("swap_kept", "swap_rules", "swap_speed"),
    )
}
NOT_QUICK = ("triton", "compiles_whole", "exports", "gpu")
#: The files of tests that take a minute and more: they run first, so that the last worker to end
#: does not end long after the others.
LONG = {
    f"test_{name}" for name in ("wheels", "triton", "cpu_levels", "machine_code", "cli", "bench")
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in QUICK and not any(name in item.name for name in NOT_QUICK):
            item.add_marker(pytest.mark.quick)
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """Print which tests could not run on this machine, and why."""
    skipped = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
    )
    again = [
        f"{report.nodeid}: {missed}"
        for report in terminalreporter.stats.get("passed", ())
        for name, missed in report.user_properties
        if name == "judged again"
    ]
    if again:
        terminalreporter.section(f"{len(again)} judged again, and passed")
        for line in again:
            terminalreporter.line(line)
    terminalreporter.section("not run here")
    if not HAS_GPU:
        terminalreporter.line("every test on a GPU: torch finds none")
    if os.environ.get("LLMOS_SKIP_TRITON"):
        terminalreporter.line("every test of Triton kernels: LLMOS_SKIP_TRITON is set")
    for reason, count in skipped.most_common():
        terminalreporter.line(f"{count} test{'s' * (count > 1)}: {reason}")


@pytest.fixture(params=DEVICES)
def device(request):
    """Return each device in turn, with a fixed random seed."""
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def one_thread():
    """Run the test on one thread, for tensors so small that more threads cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def untimed(monkeypatch, one_thread):
    """Let ``optimize`` prove swaps, and time nothing: for tests with ``always=True``."""
    from llmos_kernels.swap import timing

    monkeypatch.setattr(timing, "of_module", lambda *_, **__: [])
    monkeypatch.setattr(timing, "of_model", lambda *_, **__: ([], {}))


def _round_to_nearest(interpreter):
    """Make casts from float32 to bfloat16 round, as GPUs do; Triton 3.6 to 3.9 truncate."""
    import numpy as np

    original = interpreter._convert_float

    def convert(values, source, target, mode):
        if str(source) != "fp32" or str(target) != "bf16":
            return original(values, source, target, mode)
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(is_nan, bits >> 16 | 0x40, rounded).astype(np.uint16).reshape(values.shape)

    interpreter._convert_float = convert


def _dot(interpreter):
    """Make dot products of floats exact but for one rounding, also of bfloat16.

    Triton 3.6 to 3.9 multiply the bits of bfloat16 as unsigned integers. numpy's order of summation
    is not that of a GPU, and differs between machines.
    """
    import numpy as np

    original = interpreter.InterpreterBuilder.create_dot

    def wide(handle):
        if str(handle.dtype.scalar) == "bf16":
            return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return handle.data.astype(np.float64)

    def create_dot(self, a, b, d, *rest):
        if d.data.dtype != np.float32:
            return original(self, a, b, d, *rest)
        product = np.matmul(wide(a), wide(b)) + d.data
        return interpreter.TensorHandle(product.astype(np.float32), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
    np.seterr(over="ignore", invalid="ignore")  # GPUs do not warn about infinity and NaN.


if not HAS_GPU:
    try:
        from triton.runtime import interpreter
    except ImportError:
        pass
    else:
        _round_to_nearest(interpreter)
        _dot(interpreter)


@pytest.fixture
def our_forward():
    """Let the policy choose our GEMM for forward products, also where torch's was faster."""
    with _product_policy.override({_product_policy.FORWARD: _product_policy.OURS}):
        yield


@pytest.fixture
def process_group(tmp_path):
    """Be the only process of a group."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def packs(monkeypatch):
    """The numbers of tokens of the batches that are packed."""
    from llmos_kernels.nn.packed import Packed

    found, take = [], Packed.take

    def noted(self, x):
        if x.ndim == 3:
            found.append(self.total)
        return take(self, x)

    monkeypatch.setattr(Packed, "take", noted)
    return found
