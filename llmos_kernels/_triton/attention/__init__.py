"""Triton kernels of attention, forward and backward."""
