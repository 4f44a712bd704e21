"""Launching of Triton kernels: the pack, tuned settings, and the shapes that are compiled ahead."""
