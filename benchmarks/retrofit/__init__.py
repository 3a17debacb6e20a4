"""Benchmark of what memory layers add to a finished model, and what they cost it."""
