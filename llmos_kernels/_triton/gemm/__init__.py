"""Triton kernels: matrix products and what is fused to them."""
