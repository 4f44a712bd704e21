"""Call the libraries that ours is compared with, each in a few lines.

For ops, a function takes a Case and returns a call that takes the Case's arguments, or None if the
library cannot give the same result. For models, a function takes a model and its inputs and returns
one call. Some need an environment of their own (peer_process.py), so this file imports nothing but
torch.
"""

import functools
import importlib.metadata
import os
import tempfile
import warnings
from pathlib import Path

import torch

#: The Python of libraries that cannot share an environment: ``make peers``.
PYTHON = Path(__file__).parents[1] / "build" / "peers" / "bin" / "python"


def reference(case):
    return case.reference


def eager(case):
    """Return torch's fastest way that needs no compiler; for attention SDPA."""
    return case.baseline or case.eager


def compiled(case):
    from torch._functorch import config

    config.donated_buffer = False  # The backward of one forward is timed many times.
    torch._dynamo.reset()
    return torch.compile(case.baseline or case.eager)


def _sdpa(backend, case):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not case.name.startswith("attention"):
        return None

    def call(*args):
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            return (case.baseline or case.eager)(*args)

    return call


def flex_attention(case):
    from torch.nn.attention import flex_attention as flex

    kind = case.name.removeprefix("attention")
    if kind not in ("", "-causal", "-bias", "-padding"):
        return None
    torch._dynamo.reset()
    fn = torch.compile(flex.flex_attention)

    @functools.cache  # A mask is made once for many layers.
    def block_mask(q, k, padding):
        seen = {
            "-causal": lambda b, h, i, j: i >= j,
            "-padding": lambda b, h, i, j: ~padding[b, j],
        }
        if kind not in seen:
            return None
        batch = len(padding) if padding is not None else None
        return flex.create_block_mask(
            seen[kind], batch, None, q.shape[2], k.shape[2], device=q.device.type
        )

    def call(q, k, v, attn_mask, padding):
        bias = None
        if attn_mask is not None:
            bias = lambda logit, b, h, i, j: logit + attn_mask[0, h, i, j]
        return fn(q, k, v, score_mod=bias, block_mask=block_mask(q, k, padding))

    return call


def liger(case):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return {
        "layer_norm": lambda x, _, w, b, eps: LigerLayerNormFunction.apply(x, w, b, eps),
        "rms_norm": lambda x, _, w, eps: LigerRMSNormFunction.apply(x, w, eps),
    }.get(case.name)


def flash_attn(case):
    from flash_attn import flash_attn_func

    causal = {"attention": False, "attention-causal": True}.get(case.name)
    if causal is None:
        return None

    def call(q, k, v, attn_mask, padding):
        out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal)
        return out.transpose(1, 2)

    return call


OPS = {
    "reference": reference,
    "eager": eager,
    "compile": compiled,
    "flex_attention": flex_attention,
    "sdpa_cudnn": functools.partial(_sdpa, "CUDNN_ATTENTION"),
    "sdpa_flash": functools.partial(_sdpa, "FLASH_ATTENTION"),
    "sdpa_efficient": functools.partial(_sdpa, "EFFICIENT_ATTENTION"),
    "liger": liger,
    "flash_attn": flash_attn,
}


def dynamic(linear):
    """Return torch's own dynamic quantization of a Linear, which takes float32 alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is deprecated for torchao.
        model = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(linear), {torch.nn.Linear}, torch.qint8
        )
    return model[0]


def int_mm(layer, x):
    """Return a linear layer put together of torch's ops: quantize, torch._int_mm, scale."""
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    rows = (x / scale).round().to(torch.int8)
    sums = torch._int_mm(rows, layer.weight_int8.t())
    return (sums.float() * scale * layer.weight_scale + layer.bias).to(x.dtype)


class FirstOutput(torch.nn.Module):
    """A model of transformers as a function of one or two tensors, the second of that name."""

    def __init__(self, model, second="attention_mask"):
        super().__init__()
        self.model, self.second = model, second

    def forward(self, input_ids, other=None):
        second_input = {} if other is None else {self.second: other}
        return self.model(input_ids=input_ids, use_cache=False, **second_input)[0]


def zentorch(model, inputs):
    import zentorch  # noqa: F401  registers its backend
    from torch._inductor import config

    config.freezing = True
    compiled = torch.compile(model, backend="zentorch")
    return lambda: compiled(*inputs)


def onnxruntime(model, inputs):
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


def onnxruntime_int8(model, inputs):
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path, small = (os.path.join(folder, name) for name in ("model.onnx", "int8.onnx"))
        torch.onnx.export(model, inputs, path, dynamo=True, verbose=False)
        quantize_dynamic(path, small, weight_type=QuantType.QInt8, per_channel=True)
        session = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
    return _session_call(session, inputs)


def torchao(model, inputs):
    from torch._inductor import config
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    config.freezing = True
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model, mode="max-autotune")
    return lambda: compiled(*inputs)


def bitsandbytes(model, inputs):
    import bitsandbytes.nn as bnb

    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear:
            new = bnb.Linear8bitLt(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                has_fp16_weights=False,
                threshold=6.0,
            )
            weight = layer.weight.data.clone()
            new.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            new.bias = layer.bias
            outer, _, last = name.rpartition(".")
            setattr(model.get_submodule(outer), last, new.to("cpu").eval())
    return lambda: model(*inputs)


MODELS = {"zentorch": zentorch, "onnxruntime": onnxruntime}
INT8_MODELS = {
    "onnxruntime_int8": onnxruntime_int8,
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
}


def _missing(package: str) -> str | None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"
    return None


@functools.cache
def absent(device: str) -> dict[str, str]:
    """Return why each provider that cannot run here is absent."""
    found = {}
    for name, package in (("liger", "liger-kernel"), ("flash_attn", "flash-attn")):
        found[name] = "it runs on GPUs alone" if device == "cpu" else _missing(package)
    for name in ("sdpa_cudnn", "sdpa_flash", "sdpa_efficient"):
        found[name] = "a choice of kernels there is on GPUs alone" if device == "cpu" else None
    for name in (*MODELS, *INT8_MODELS):
        if device == "cuda":
            found[name] = "compared on CPUs"
        elif not PYTHON.exists():
            found[name] = "make peers installs it"
    return {k: why for k, why in found.items() if why is not None}


def ops(device: str) -> list[str]:
    """Return the providers of ops that can run here, ours first."""
    return ["kernel", *(name for name in OPS if name not in absent(device))]


def models(device: str, int8: bool = False) -> list[str]:
    """Return the libraries that can run whole models here."""
    return [n for n in (INT8_MODELS if int8 else MODELS) if n not in absent(device)]


def versions() -> dict[str, str]:
    """Return the versions of the libraries in this environment."""
    packages = "torch", "triton", "transformers", "liger-kernel", "flash-attn", "pytest-benchmark"
    return {p: importlib.metadata.version(p) for p in packages if _missing(p) is None}
