"""Triton kernels of GEMMs with fused epilogues."""
