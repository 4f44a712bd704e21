"""Hugging Face transformers: attention under the name "llmos", and int8 weights.

Importing this package registers the attention function and its mask function with transformers, so
that ``model.set_attn_implementation("llmos")`` takes them.  Importing ``LlmosInt8Config`` from it
registers the config and the quantizer of int8 weights, "llmos_int8".

Example:
    >>> import llmos_kernels.integrations.transformers
    >>> model.set_attn_implementation("llmos")

    >>> from llmos_kernels.integrations.transformers import LlmosInt8Config
    >>> model = AutoModel.from_pretrained(path, quantization_config=LlmosInt8Config())
"""

from typing import TYPE_CHECKING, Any

from llmos_kernels.integrations.transformers.attention import NAME, attention

if TYPE_CHECKING:
    from llmos_kernels.integrations.transformers.int8 import LlmosInt8Config

__all__ = ["NAME", "LlmosInt8Config", "attention"]


def __getattr__(name: str) -> Any:
    if name != "LlmosInt8Config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmos_kernels.integrations.transformers.int8 import LlmosInt8Config

    return LlmosInt8Config
