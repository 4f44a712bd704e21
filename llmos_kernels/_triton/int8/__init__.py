"""Triton kernels of int8 quantisation and int8 GEMMs."""
