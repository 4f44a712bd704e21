"""Checks that test_pack.py runs in a separate process, with Triton's compiler.

python pack_session.py keys sm_90
python pack_session.py covered sm_90
python pack_session.py tuned sm_80 sm_90
python pack_session.py unready
python pack_session.py gpus "8.0 9.0+PTX"
python pack_session.py bits FOLDER   # on a GPU
"""

import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from llmos_kernels import _C
from llmos_kernels._core.registry import DEFINED, CannotCompile
from llmos_kernels._tools import build_pack
from llmos_kernels._triton.runtime import kernel_pack
from llmos_kernels._triton.runtime import launch as launching
from llmos_kernels._triton.runtime.launch import OPTIONS, Kernel, parameters
from llmos_kernels.ops._activations import GELU, GELU_TANH, RELU


def keys(arch: str) -> None:
    """Check that the C++ launcher, ``launch_of`` and Triton specialise every call alike."""
    backend = make_backend(GPUTarget("cuda", int(arch.removeprefix("sm_")), 32))
    checked = []

    def run(self, grid, args, kwargs):
        launch = build_pack.launch_of(self, args, dict(kwargs))
        made = _C.PackedKernel(parameters(self), list(OPTIONS), kernel_pack.DTYPES).key(
            args, kwargs
        )
        assert made == launch.key, f"{self.name}: {made} is not {launch.key}"
        bind = create_function_from_signature(self.signature, self.params, backend)
        _, specialization, _ = bind(*args, **kwargs)
        for (name, kind), (expected, attribute) in zip(
            launch.signature, specialization, strict=True
        ):
            assert kind == expected, f"{self.name} {name}: {kind} is not {expected}"
            if kind != "constexpr":
                assert ("D" in (attribute or "")) == (name in launch.aligned), (self.name, name)
        checked.append(launch.key)

    with mock.patch.object(Kernel, "launch", run), build_pack.planned_for(arch):
        for launcher, args in build_pack.calls():
            launcher(*args)
    print(len(checked), "launches,", len(set(checked)), "keys")


#: (d_model, heads, activation) of MiniLM, BERT base and large, GPT-2, T5 small, OPT 1.3B.
MODELS = (
    (384, 12, GELU),
    (768, 12, GELU),
    (1024, 16, GELU),
    (768, 12, GELU_TANH),
    (512, 8, RELU),
    (2048, 32, RELU),
)


def model_calls(d, heads, activation, dtype, batch, length):
    """Yield (name, arguments) of the op calls of such a layer in training and inference."""
    seed, head_dim = torch.empty(2, dtype=torch.int64), d // heads
    empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype)
    x, hidden, parameter = empty(batch * length, d), empty(batch * length, 4 * d), empty(d)
    stats = empty(2, batch * length, dtype=torch.float32)
    index, table = empty(batch, length, dtype=torch.int64), empty(512, d)
    sources = index, index, index, table, table, table
    for p in (0.0, 0.1):
        drop = p, seed
        norm = parameter, parameter, d, 1e-5, True
        yield "layer_norm_forward", (x, *norm)
        yield "add_layer_norm_forward", (x, x, *norm, *drop)
        yield "layer_norm_backward", (x, x, x, parameter, stats, d, True, *drop, True, True)
        yield "embedding_layer_norm_forward", (*sources, parameter, parameter, 1e-5, *drop)
        yield (
            "embedding_layer_norm_backward",
            (x.view(batch, length, d), *sources, parameter, stats, *drop, True, True),
        )
        yield (
            "linear_forward",
            (x, empty(4 * d, d), empty(4 * d), activation, *drop, p > 0 and activation != RELU),
        )
        yield "linear_dinput", (x, empty(d, 4 * d), hidden, activation, *drop)
        yield "activation_forward", (hidden, activation, *drop)
        yield "activation_backward", (hidden, hidden, activation, *drop)
    q = empty(batch, length, heads, head_dim).transpose(1, 2)
    padding = empty(batch, length, dtype=torch.bool)
    row_stats = empty(2, batch, heads, length, dtype=torch.float32)
    for mask, causal, p in ((None, 0, 0.0), (padding, 0, 0.0), (None, 1, 0.0), (padding, 0, 0.1)):
        options = head_dim**-0.5, causal, p, 0.0, seed
        yield "attention_forward", (q, q, q, None, mask, None, None, None, *options)
        yield (
            "attention_backward",
            (q, q, q, q, None, mask, *(None,) * 3, q.transpose(1, 2), row_stats, *options, False),
        )
    options = head_dim**-0.5, 0, 0.0, 0.0, seed
    yield "attention_weights", (q, q, None, padding, row_stats, *options, True)
    single_query, cache = q[:, :, :1], empty(batch, heads, 2 * length + 512, head_dim)
    yield (
        "attention_forward",
        (single_query, cache, cache, *(None,) * 5, *options),
    )
    weight, scale = empty(4 * d, d, dtype=torch.int8), empty(4 * d, dtype=torch.float32)
    last = empty(4 * d), activation
    rows, row_scale = (
        empty(batch * length, d, dtype=torch.int8),
        empty(batch * length, dtype=torch.float32),
    )
    ids = empty(batch * length, 1, dtype=torch.int64)
    for values in (x, ids):
        yield "gather_rows", (values, ids[:, 0])
        yield "scatter_rows", (values, ids[:, 0], 4 * batch * length)
    yield "int8_quantize", (x,)
    yield "int8_matmul", (rows, weight, row_scale, scale, None, *last, dtype)
    for threshold in (0.0, 6.0):
        yield "int8_linear", (x, weight, scale, None, *last, threshold)
    yield "int8_linear_rows", (x, weight, scale, None, *last)
    unsigned = torch.empty(batch * length, 4 * d, dtype=torch.uint8)
    second, scales = torch.empty(d, 4 * d, dtype=torch.int8), torch.empty(d)
    yield "int8_matmul", (unsigned, second, row_scale, scales, None, parameter, 0, dtype)
    yield "int8_weight_only", (x[:8], weight, scale, *last)
    yield "int8_norm", (x, x, parameter, parameter, d, 1e-5, True)


def covered(arch: str) -> None:
    """Check that the pack has every launch that common models make by default."""
    having = {(v.name, v.key) for v in build_pack.variants(arch)}
    ops, found, missing = set(), set(), {}
    for model, dtype, (batch, length) in itertools.product(
        MODELS, (torch.bfloat16, torch.float16, torch.float32), ((8, 128), (16, 512), (3, 100))
    ):
        for op, args in model_calls(*model, dtype, batch, length):
            ops.add(f"llmos::{op}")
            with build_pack.recorded_launches(arch) as launches:
                DEFINED[f"llmos::{op}"].launch(*args)
            found.update((k.name, k.key) for k in launches)
            missing |= {
                k: (op, *model, dtype, batch, length)
                for k in launches
                if (k.name, k.key) not in having
            }
    # On GPUs cuBLAS computes the gradients of weights.
    lacking = {name for name, op in DEFINED.items() if op.triton} - ops - {"llmos::linear_dweight"}
    assert not lacking, f"no call of {lacking}"
    assert not missing, "\n".join(f"{k.name} {k.key}: {call}" for k, call in missing.items())
    print(len(found), "launches of", len(ops), "ops")


def bits(folder: str) -> None:
    """Check on a GPU that kernels from the pack and from Triton give the same bits, twice each."""
    arch, counts, checked = kernel_pack.arch_of(0), {}, 0

    def filled(a):
        if not isinstance(a, torch.Tensor):
            return a
        made = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
        return made.normal_() if a.is_floating_point() else made.zero_()

    for launcher, args in build_pack.calls():
        with build_pack.recorded_launches(arch) as launches:
            launcher(*args)
        if not launches or all(counts.get(k.name, 0) == 2 for k in launches):
            continue
        counts |= {k.name: counts.get(k.name, 0) + 1 for k in launches}
        build_pack.build(Path(folder), {arch: list(dict.fromkeys(launches))})
        pack, given, results = (
            kernel_pack.Pack(Path(folder) / f"{arch}.json"),
            [*map(filled, args)],
            [],
        )
        for found in (pack, None):
            for fn in {k.fn for k in launches}:
                fn.pack_kernels[0] = found and found.kernel(fn.name, parameters(fn), OPTIONS)
            with mock.patch.object(kernel_pack, "MODE", "require" if found else "off"):
                results.append(launcher(*given))
        from_pack, from_triton = (r if isinstance(r, tuple) else (r,) for r in results)
        for a, b in zip(from_pack, from_triton, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), (launcher, launches)
        checked += 1
    print(checked, "calls")


def tuned(*archs: str) -> None:
    """Print the number of variants of one module for each architecture."""
    print(json.dumps({arch: len(build_pack.variants(arch, ["int8.layer_norm"])) for arch in archs}))


def unready() -> None:
    """Print what launches raise where Triton cannot compile: a full disk, then no compiler."""
    fn, fails = DEFINED["llmos::activation_forward"].launch, []

    def run(self, *args, **kwargs):
        raise fails[-1]

    def said():
        try:
            fn(torch.empty(4, 1536), RELU, 0.0, None)
        except CannotCompile as e:
            return str(e)
        except RuntimeError as e:
            return f"raised: {e}"

    with (
        mock.patch.object(Kernel, "run", run),
        mock.patch.object(launching, "current", lambda: (0, 0)),
        mock.patch.object(kernel_pack, "for_device", lambda device: None),
    ):
        for error in (
            OSError(28, "No space left"),
            RuntimeError("ours"),
            RuntimeError("Failed to find C compiler. Please"),
            RuntimeError("not reached"),
        ):
            fails.append(error)
            print(said())


def gpus(*lists: str) -> None:
    """Print the architectures of each list of GPUs, or the error for it."""
    found: list = []
    for listed in lists:
        try:
            found.append(build_pack.pack_archs(listed.split()))
        except ValueError as e:
            found.append(str(e))
    print(json.dumps(found))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
