"""Benchmarks that ``memplus bench`` runs; no test asserts on speed."""
