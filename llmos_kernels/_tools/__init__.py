"""What ``python -m llmos_kernels`` runs; the library imports nothing from here."""
