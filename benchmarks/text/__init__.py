"""Benchmark of perplexity of text against memory size, at equal compute."""
