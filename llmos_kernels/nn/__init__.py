"""Drop-in modules: the names, arguments, state dicts and results of ``torch.nn``."""

from llmos_kernels.nn.attention import MultiheadAttention
from llmos_kernels.nn.norm import AddLayerNorm, LayerNorm, RMSNorm

__all__ = ["AddLayerNorm", "LayerNorm", "MultiheadAttention", "RMSNorm"]
