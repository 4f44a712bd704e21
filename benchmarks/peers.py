"""Peers that need an environment of their own: each runs in a process there and is timed in turn.

``make peers`` builds the environment from ``.ci/requirements-peers.txt`` in ``build/peers``. The
process gets the model and its inputs, answers with the result, which the caller checks, and then
runs as often as each line it reads says. It sleeps before it answers, so that its threads have
stopped spinning when the next provider starts.
"""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

PYTHON = Path(__file__).parents[1] / "build" / "peers" / "bin" / "python"
_REST = 0.3  # Seconds: idle threads of OpenMP spin for up to 0.2.


def _zentorch(model, inputs):
    import zentorch  # noqa: F401  registers its backend
    from torch._inductor import config

    config.freezing = True
    compiled = torch.compile(model, backend="zentorch")
    return lambda: compiled(*inputs)


def _onnxruntime(model, inputs):
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        torch.onnx.export(model, inputs, path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return _session_call(session, inputs)


def _session_call(session, inputs):
    feeds = dict(
        zip((i.name for i in session.get_inputs()), (x.numpy() for x in inputs), strict=True)
    )
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


def _onnxruntime_int8(model, inputs):
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path, small = (os.path.join(folder, name) for name in ("model.onnx", "int8.onnx"))
        torch.onnx.export(model, inputs, path, dynamo=True, verbose=False)
        quantize_dynamic(path, small, weight_type=QuantType.QInt8, per_channel=True)
        session = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
    return _session_call(session, inputs)


def _torchao(model, inputs):
    from torch._inductor import config
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    config.freezing = True
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model, mode="max-autotune")
    return lambda: compiled(*inputs)


def _bitsandbytes(model, inputs):
    import bitsandbytes.nn as bnb

    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear:
            new = bnb.Linear8bitLt(
                layer.in_features, layer.out_features, layer.bias is not None,
                has_fp16_weights=False, threshold=6.0,
            )  # fmt: skip
            weight = layer.weight.data.clone()
            new.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            new.bias = layer.bias
            outer, _, last = name.rpartition(".")
            setattr(model.get_submodule(outer), last, new.to("cpu").eval())
    return lambda: model(*inputs)


_FLOAT = {"zentorch": _zentorch, "onnxruntime": _onnxruntime}
_INT8 = {
    "onnxruntime_int8": _onnxruntime_int8,
    "torchao": _torchao,
    "bitsandbytes": _bitsandbytes,
}


def main(name: str, folder: str) -> None:
    """The process of one peer."""
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    inputs = torch.load(f"{folder}/inputs.pt")
    model = torch.load(f"{folder}/model.pt", weights_only=False)
    torch.backends.mha.set_fastpath_enabled(False)  # It hides whole layers from compilers.
    with torch.no_grad():
        call = (_FLOAT | _INT8)[name](model, inputs)
        result = call()
        torch.save(result if isinstance(result, torch.Tensor) else result[0], f"{folder}/{name}.pt")
        packages = "torch", name.removesuffix("_int8")
        versions = {m: importlib.metadata.version(m) for m in packages}
        print(json.dumps(versions), file=answers, flush=True)
        for calls in map(int, sys.stdin):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds = (time.perf_counter() - start) / calls
            time.sleep(_REST)
            print(seconds, file=answers, flush=True)


def available(int8: bool = False) -> tuple[str, ...]:
    """The peers that can be asked here: of float models, or of int8."""
    return tuple(_INT8 if int8 else _FLOAT) if PYTHON.exists() else ()


@contextlib.contextmanager
def _all_cores():
    """This thread's pinning would be the process's."""
    own = os.sched_getaffinity(0)
    threads = (int(t) for t in os.listdir("/proc/self/task"))
    os.sched_setaffinity(0, set().union(*map(os.sched_getaffinity, threads)))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


class Peer:
    """A call of ``model`` by another library, with its ``result`` and the ``versions`` used."""

    def __init__(self, name: str, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]):
        with tempfile.TemporaryDirectory() as folder:
            torch.save(inputs, f"{folder}/inputs.pt")
            torch.save(model, f"{folder}/model.pt")
            env = dict(os.environ)
            if name.startswith("onnxruntime"):  # Its own threads would all stay on the first core.
                env = {k: v for k, v in env.items() if k not in ("OMP_PROC_BIND", "OMP_PLACES")}
            with _all_cores():
                self._process = subprocess.Popen(
                    [PYTHON, __file__, name, folder], env=env, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )  # fmt: skip
            self.versions = json.loads(self._read())
            self.result = torch.load(f"{folder}/{name}.pt")

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a peer ended with {self._process.wait()}")
        return line

    def timed(self, calls: int) -> float:
        """The seconds of one of ``calls`` calls."""
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        self._process.communicate()


if __name__ == "__main__":
    main(*sys.argv[1:])
