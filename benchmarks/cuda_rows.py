"""Measure up to how many rows CUDA C++ is faster than Triton's launcher, and write that down.

    python benchmarks/cuda_rows.py FILE

A call is timed as its user meets it, the host's part with the GPU's: in a stream that is never
empty, for 16 calls at once. FILE is then one for ``tuned/gpu`` (``_core/cuda_part.py``), with the
largest number of rows of each width at which C++ was not slower, for this GPU's architecture.
Torch's own time is printed beside both, the time of the GPU alone, and at the end whose attention
an encoder layer has called. Without a GPU or the CUDA part it says so.
"""

import itertools
import json
import os
import statistics
import sys
from functools import partial
from pathlib import Path

os.environ["LLMOS_CUDA"] = "cpp"  # All calls of the ops themselves go to C++.

import torch
import torch.nn.functional as F

from llmos_kernels import nn
from llmos_kernels._core import cuda_part
from llmos_kernels._core.extension import CUDA_PART
from llmos_kernels._core.timing import samples
from llmos_kernels._tools.device_time import captured, seconds

WIDTHS, OUT, CALLS = (256, 1024, 4096), 4096, 16
ROWS = tuple(2**i for i in range(13))


def calls(rows, width, device, dtype=torch.bfloat16):
    """Yield the name of each op, its arguments for such rows, and what torch has instead."""
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
    x, w = draw(rows, width), draw(width)
    norm = partial(F.layer_norm, x, (width,), w, w)
    yield "layer_norm_forward", (x, w, w, width, 1e-5, True), norm
    add = lambda: F.layer_norm(x + x, (width,), w, w)
    yield "add_layer_norm_forward", (x, x, w, w, width, 1e-5, True, 0.0, None), add
    stats = torch.rand(2, rows, device=device)
    gradients = x, None, x, w, stats, width, True, 0.0, None, True, True
    yield "layer_norm_backward", gradients, None
    yield "int8_norm", (x, None, w, w, width, 1e-5, True), None
    yield "int8_quantize", (x,), None
    index, table = torch.randint(0, 99, (rows,), device=device), draw(99, width)
    embed = lambda: F.layer_norm(F.embedding(index, table), (width,), w, w)
    given = index, None, None, table, None, None, w, w, 1e-5, 0.0, None
    yield "embedding_layer_norm_forward", given, embed
    if rows <= 16:
        weight = torch.ones(OUT, width, device=device, dtype=torch.int8)
        scale, dense = torch.ones(OUT, device=device), draw(OUT, width)
        linear = partial(F.linear, x, dense)
        yield "int8_linear", (x, weight, scale, None, None, 0, 0.0), linear
        yield "int8_weight_only", (x, weight, scale, None, 0), linear


def as_called(call):
    """Return a function that calls often enough for the host to be seen, and waits."""

    def run():
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()

    return run


def print_attention(device="cuda"):
    """Run an encoder layer without and with padding, and print who computed its attention."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, device=device).eval()
    src, padding = torch.randn(1, 8, 256, device=device), torch.zeros(1, 8, device=device) > 0
    with torch.inference_mode():
        layer(src)
        layer(src, src_key_padding_mask=padding)
    print("attention of an encoder layer, calls:", cuda_part.attention_calls(CUDA_PART))


def main() -> int:
    """Measure, print and write; return 1 where that cannot be done here."""
    if not torch.cuda.is_available() or not hasattr(torch.ops.llmos, "layer_norm_forward_triton"):
        print("no GPU, or no CUDA part (TORCH_CUDA_ARCH_LIST): nothing is measured")
        return 1
    largest = {name: dict.fromkeys(WIDTHS, 0) for name, *_ in calls(1, 256, "cuda")}
    for width, rows in itertools.product(WIDTHS, ROWS):
        for name, args, torchs in calls(rows, width, "cuda"):
            ops = [getattr(torch.ops.llmos, name), getattr(torch.ops.llmos, f"{name}_triton")]
            timed = [partial(op, *args) for op in ops] + ([torchs] if torchs else [])
            for call in timed:
                call()
            found = samples([as_called(call) for call in timed], 30, 0.0, 1.0, 3)
            us = [statistics.median(times) / CALLS * 1e6 for times in found]
            device = [seconds(captured([call] * CALLS).replay) / CALLS * 1e6 for call in timed]
            shown = (f"{a:7.2f} ({b:6.2f})" for a, b in zip(us, device, strict=True))
            print(f"{name:30} {rows:5} x {width:4}, us a call (on the GPU): " + ", ".join(shown))
            # It counts while C++ was not slower at any smaller number of rows.
            if us[0] <= us[1] and largest[name][width] == rows // 2:
                largest[name][width] = rows
    # This one is handed indices, which have no width.
    largest["embedding_layer_norm_forward"] = min(largest["embedding_layer_norm_forward"].values())
    print_attention()
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}"
    Path(sys.argv[1]).write_text(json.dumps({arch: largest}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
