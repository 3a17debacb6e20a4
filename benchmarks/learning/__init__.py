"""Benchmark of learning facts: exact answers learned, and answers known before that are lost."""
