"""Metrics of clients, distributions over clients (metrics.py), and comparisons of runs (compare.py)."""
