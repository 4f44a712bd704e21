"""The Triton kernels of the ops, by kind; ``runtime`` finds, compiles and launches them."""
