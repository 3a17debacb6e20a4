"""Contestants, runs and plot that benchmarks of scores against table size share."""
