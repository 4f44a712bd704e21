"""Run peers that need an environment of their own, each in a process, timed in turn.

``make peers`` builds the environment from ``requirements/peers.txt`` in ``build/peers``. The
process gets the model and its inputs, answers with the result, which the caller checks, and then
runs as often as each line that it reads says. It sleeps before it answers, so that its threads have
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

import peers
import torch

_REST = 0.3  # Seconds: idle threads of OpenMP spin for up to 0.2.


def main(name: str, folder: str) -> None:
    """Run one peer; this is what its process does."""
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    inputs = torch.load(f"{folder}/inputs.pt")
    model = torch.load(f"{folder}/model.pt", weights_only=False)
    torch.backends.mha.set_fastpath_enabled(False)  # It hides whole layers from compilers.
    with torch.no_grad():
        call = (peers.MODELS | peers.INT8_MODELS)[name](model, inputs)
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


@contextlib.contextmanager
def _all_cores():
    """Lift this thread's pinning, which a process started here would inherit."""
    pinned = os.sched_getaffinity(0)
    threads = (int(t) for t in os.listdir("/proc/self/task"))
    os.sched_setaffinity(0, set().union(*map(os.sched_getaffinity, threads)))
    try:
        yield
    finally:
        os.sched_setaffinity(0, pinned)


class Peer:
    """A call of ``model`` by another library, with its ``result`` and the ``versions`` used."""

    def __init__(self, name: str, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]):
        with tempfile.TemporaryDirectory() as folder:
            torch.save(inputs, f"{folder}/inputs.pt")
            torch.save(model, f"{folder}/model.pt")
            env = dict(os.environ)
            # Pinning would put all its own threads on the first core.
            if name.startswith("onnxruntime"):
                env = {k: v for k, v in env.items() if k not in ("OMP_PROC_BIND", "OMP_PLACES")}
            with _all_cores():
                self._process = subprocess.Popen(
                    [peers.PYTHON, __file__, name, folder],
                    env=env,
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            self.versions = json.loads(self._read())
            self.result = torch.load(f"{folder}/{name}.pt")

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a peer ended with {self._process.wait()}")
        return line

    def timed(self, calls: int) -> float:
        """Return the seconds of one call, of ``calls`` in a row."""
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        self._process.communicate()


def add_peer(row, stack: contextlib.ExitStack, name: str, model, inputs, judged) -> None:
    """Add a peer to ``row``, judged by ``judged``, until ``stack`` is closed."""
    from rows import Call

    def build():
        peer = Peer(name, model, inputs)
        stack.callback(peer.close)
        row.pids.append(peer.pid)
        return Call(peer, (), judged(peer.result) | {"versions": peer.versions})

    row.add(name, build)


if __name__ == "__main__":
    main(*sys.argv[1:])
