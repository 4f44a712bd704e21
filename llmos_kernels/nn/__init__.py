"""Drop-in modules: the names, arguments, state dicts and results of ``torch.nn``.

A module here holds state and calls a function of ``llmos_kernels``, which does the work.
"""

from llmos_kernels.nn.attention import MultiheadAttention
from llmos_kernels.nn.embedding import BertEmbedding
from llmos_kernels.nn.feed_forward import FeedForward
from llmos_kernels.nn.int8 import Int8Linear, Int8MultiheadAttention
from llmos_kernels.nn.linear import Linear
from llmos_kernels.nn.norm import AddLayerNorm, LayerNorm, RMSNorm
from llmos_kernels.nn.packed_transformer import (
    Transformer,
    TransformerDecoder,
    TransformerEncoder,
)
from llmos_kernels.nn.position import SinusoidalPositionalEncoding
from llmos_kernels.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "AddLayerNorm",
    "BertEmbedding",
    "FeedForward",
    "Int8Linear",
    "Int8MultiheadAttention",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "SinusoidalPositionalEncoding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
