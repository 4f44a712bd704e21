"""What ``python -m llmos_kernels`` runs. The library never imports it."""
