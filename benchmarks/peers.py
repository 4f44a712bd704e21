"""Peers that need an environment of their own: each runs in a process there and is timed in turn.

``make peers`` builds the environment from ``.ci/requirements-peers.txt`` in ``build/peers``. The
process gets the model and its inputs, answers with the result, which the caller checks, and then
runs as often as each line it reads says. It sleeps before it answers, so that its threads have
stopped spinning when the next provider starts.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

PYTHON = Path(__file__).parents[1] / "build" / "peers" / "bin" / "python"
NAMES = ("zentorch", "onnxruntime")
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
    feeds = dict(
        zip((i.name for i in session.get_inputs()), (x.numpy() for x in inputs), strict=True)
    )
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


def main(name: str, folder: str) -> None:
    """The process of one peer."""
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    inputs = torch.load(f"{folder}/inputs.pt")
    model = torch.load(f"{folder}/model.pt", weights_only=False)
    torch.backends.mha.set_fastpath_enabled(False)  # It hides whole layers from compilers.
    with torch.no_grad():
        call = {"zentorch": _zentorch, "onnxruntime": _onnxruntime}[name](model, inputs)
        torch.save(call(), f"{folder}/{name}.pt")
        versions = {m: __import__(m).__version__ for m in ("torch", name)}
        print(json.dumps(versions), file=answers, flush=True)
        for calls in map(int, sys.stdin):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds = (time.perf_counter() - start) / calls
            time.sleep(_REST)
            print(seconds, file=answers, flush=True)


def available() -> tuple[str, ...]:
    """The peers that can be asked here."""
    return NAMES if PYTHON.exists() else ()


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
            if name == "onnxruntime":  # Its own threads would all stay on the first core.
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
