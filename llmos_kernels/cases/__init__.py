"""The table of cases that tests, benchmarks, ``verify`` and ``inspect`` share."""

from llmos_kernels.cases.attention import ATTENTION
from llmos_kernels.cases.case import Case
from llmos_kernels.cases.embedding import EMBEDDING
from llmos_kernels.cases.linear import LINEAR
from llmos_kernels.cases.norms import NORMS

CASES = NORMS + ATTENTION + LINEAR + EMBEDDING

__all__ = ["CASES", "Case"]
