"""Swap the modules of an existing model for fused ones, in place, with proof, and back."""

from llmos_kernels.swap.files import load_quantized, save_quantized
from llmos_kernels.swap.optimize import optimize, restore
from llmos_kernels.swap.quantize import Int8Entry, Int8Report, quantize
from llmos_kernels.swap.report import Entry, Report

__all__ = [
    "Entry",
    "Int8Entry",
    "Int8Report",
    "Report",
    "load_quantized",
    "optimize",
    "quantize",
    "restore",
    "save_quantized",
]
