"""Triton kernels: int8 products."""
