"""Use the pack in the folder that LLMOS_GPU_PACK names.

Tests load this as a plugin (``pytest -p gpu_pack``). As a program it makes the calls of common
models on this GPU, which LLMOS_PACK=require must answer, twice with the same bits.
"""

import itertools
import os
from pathlib import Path

import torch


def use() -> None:
    from llmos_kernels._triton.runtime import kernel_pack

    kernel_pack.FOLDER = Path(os.environ["LLMOS_GPU_PACK"])


def pytest_configure(config):
    use()


def filled(a):
    """Return a random tensor on the GPU with the strides of ``a``; indices and masks are 0."""
    if not isinstance(a, torch.Tensor):
        return a
    made = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
    return made.normal_() if a.is_floating_point() else made.zero_()


def call(op: str, args: tuple) -> None:
    from llmos_kernels._core.registry import DEFINED

    given = [filled(a) for a in args]
    pairs = []
    for _ in range(2):
        made = DEFINED[f"llmos::{op}"].launch(*given)
        pairs.append(made if isinstance(made, tuple) else (made,))
    for first, second in zip(*pairs, strict=True):
        if not torch.equal(first.nan_to_num(), second.nan_to_num()):
            raise AssertionError(f"{op}: other bits at the second call")


def main() -> None:
    import pack_session

    use()
    dtypes, sizes = (torch.bfloat16, torch.float16, torch.float32), ((8, 128), (16, 512), (3, 100))
    calls = 0
    for model, dtype, size in itertools.product(pack_session.MODELS, dtypes, sizes):
        for op, args in pack_session.model_calls(*model, dtype, *size):
            if torch.cuda.is_available():
                call(op, args)
            calls += 1
    print(calls, "calls" if torch.cuda.is_available() else "calls that need a GPU")


if __name__ == "__main__":
    main()
