"""Swap the modules of an existing model for fused or int8 ones, in place, with proof, and back.

``optimize`` swaps what a rule in ``rules/`` knows and ``proof`` finds right, where ``timing`` finds
it not slower; ``restore`` undoes it. ``quantize`` gives linear layers int8 weights.
"""

from llmos_kernels.swap.checkpoint import load_quantized, save_quantized
from llmos_kernels.swap.int8_summary import Int8Entry, Int8Report
from llmos_kernels.swap.optimize import optimize, restore
from llmos_kernels.swap.padding import register_padding_rule
from llmos_kernels.swap.quantize import quantize
from llmos_kernels.swap.stack_padding import StackPaddingRule
from llmos_kernels.swap.summary import Entry, Padding, Report

__all__ = [
    "Entry",
    "Int8Entry",
    "Int8Report",
    "Padding",
    "Report",
    "load_quantized",
    "optimize",
    "quantize",
    "restore",
    "save_quantized",
]

for _name in ("Transformer", "TransformerEncoder", "TransformerDecoder"):
    register_padding_rule("torch.nn.modules.transformer", _name, StackPaddingRule)
