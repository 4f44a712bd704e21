"""Benchmark results as a page, plots and one figure; ``python benchmarks/report`` makes all
three."""
