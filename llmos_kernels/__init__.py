"""Fused kernels for the classic Transformer block, as drop-in PyTorch functions and modules."""

from importlib.machinery import PathFinder

# Built from csrc/. Without it ops run their reference; a broken one must raise.
if PathFinder.find_spec("llmos_kernels._C", __path__):
    from llmos_kernels._core import extension  # noqa: F401

from llmos_kernels import integrations, nn  # noqa: F401  integrations adds rules to swap
from llmos_kernels.integrations.compile.backend import compile_pass, compile_report
from llmos_kernels.integrations.export import native_decompositions
from llmos_kernels.ops import _device  # noqa: F401  defines its op
from llmos_kernels.ops.attention import scaled_dot_product_attention
from llmos_kernels.ops.embedding import embedding_layer_norm
from llmos_kernels.ops.feed_forward import feed_forward
from llmos_kernels.ops.int8 import int8_matmul, int8_quantize
from llmos_kernels.ops.int8_linear import int8_linear
from llmos_kernels.ops.int8_linear_rows import int8_linear_rows
from llmos_kernels.ops.int8_norm import int8_add_layer_norm, int8_layer_norm
from llmos_kernels.ops.int8_vnni_weight import int8_vnni_weight
from llmos_kernels.ops.layer_norm import add_layer_norm, layer_norm
from llmos_kernels.ops.linear import linear
from llmos_kernels.ops.padding import pad_input, unpad_input
from llmos_kernels.ops.rms_norm import add_rms_norm, rms_norm
from llmos_kernels.swap import load_quantized, optimize, quantize, restore, save_quantized

__version__ = "0.1.0"
__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "compile_pass",
    "compile_report",
    "embedding_layer_norm",
    "feed_forward",
    "int8_add_layer_norm",
    "int8_layer_norm",
    "int8_linear",
    "int8_linear_rows",
    "int8_matmul",
    "int8_quantize",
    "int8_vnni_weight",
    "layer_norm",
    "linear",
    "load_quantized",
    "native_decompositions",
    "nn",
    "optimize",
    "pad_input",
    "quantize",
    "restore",
    "rms_norm",
    "save_quantized",
    "scaled_dot_product_attention",
    "unpad_input",
]
