"""Integrations with other libraries, one package each. None of them is imported here.

Importing this package tells ``llmos_kernels.swap`` which rules belong to models of which library.
A rule is imported when ``optimize`` or ``restore`` gets such a model.
"""

from llmos_kernels.swap.padding import PaddingRule, register_padding_rule
from llmos_kernels.swap.rules import register_library
from llmos_kernels.swap.rules.rule import ModelRule


def _transformers_attention() -> ModelRule:
    from llmos_kernels.integrations.transformers.attention_rule import TransformersAttentionRule

    return TransformersAttentionRule()


def _transformers_padding() -> PaddingRule:
    from llmos_kernels.integrations.transformers.padding_rule import TransformersPaddingRule

    return TransformersPaddingRule()


register_padding_rule("transformers.modeling_utils", "PreTrainedModel", _transformers_padding)
register_library("transformers.modeling_utils", "PreTrainedModel", _transformers_attention)
