"""Tests of the benchmarks; none asserts on speed."""
