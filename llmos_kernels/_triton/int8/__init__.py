"""Triton kernels of int8 quantization and int8 GEMMs."""
