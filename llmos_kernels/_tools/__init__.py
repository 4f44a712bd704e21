"""The commands of ``python -m llmos_kernels``. The library never imports them."""
