"""How fast it is; run one with ``python -m benchmarks.NAME``."""
