"""Swap the modules of an existing model for fused ones, in place, with proof, and back."""

from llmos_kernels.swap.optimize import optimize, restore
from llmos_kernels.swap.report import Entry, Report

__all__ = ["Entry", "Report", "optimize", "restore"]
