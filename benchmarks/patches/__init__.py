"""Benchmark of row patches: their cost per step, and their loads."""
