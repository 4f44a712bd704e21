"""Triton kernels: attention, forward and backward."""
