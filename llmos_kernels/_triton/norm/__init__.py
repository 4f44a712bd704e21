"""Triton kernels: the norms and embeddings."""
