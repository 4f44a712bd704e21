"""The list of all cases, for tests, benchmarks, ``verify`` and ``inspect``."""

from llmos_kernels.testing.cases.attention import ATTENTION
from llmos_kernels.testing.cases.case import Case
from llmos_kernels.testing.cases.embedding import EMBEDDING
from llmos_kernels.testing.cases.linear import LINEAR
from llmos_kernels.testing.cases.norms import NORMS
from llmos_kernels.testing.cases.padding import PADDING

CASES = NORMS + ATTENTION + LINEAR + EMBEDDING + PADDING

__all__ = ["CASES", "Case"]
