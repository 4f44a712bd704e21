"""Triton kernels of LayerNorm, RMSNorm and embeddings."""
