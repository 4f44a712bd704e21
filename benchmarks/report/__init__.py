"""Show benchmark results as a page, plots and one figure: ``python benchmarks/report``."""
