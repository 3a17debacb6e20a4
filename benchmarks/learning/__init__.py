"""Benchmark of learning facts: what is learned against what is forgotten."""
