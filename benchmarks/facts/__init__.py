"""Benchmark of fact recall against memory size, at equal compute."""
