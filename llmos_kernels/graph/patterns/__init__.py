"""The patterns, in the order in which they are looked for: larger ones first."""

from llmos_kernels.graph.patterns.add_norm import AddNorm
from llmos_kernels.graph.patterns.attention import Attention
from llmos_kernels.graph.patterns.feed_forward import FeedForward, LinearActivation
from llmos_kernels.graph.patterns.norm import Norm, NormOfTorch
from llmos_kernels.graph.patterns.pattern import Pattern
from llmos_kernels.graph.patterns.sdpa import Sdpa

#: All patterns.
PATTERNS: list[Pattern] = [
    Attention(),
    Sdpa(),
    FeedForward(),
    AddNorm(),
    LinearActivation(),
    Norm(),
    NormOfTorch(),
]
