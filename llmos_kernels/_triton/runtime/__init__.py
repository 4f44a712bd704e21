"""How Triton kernels are found, compiled ahead of time, and launched."""
