"""One runnable script per figure: ``python -m benchmarks.encoder``. Each prints a table and writes JSON to ``benchmarks/results``.

Figures are ratios of things measured in one run, in turn, because machines are noisy.
"""
