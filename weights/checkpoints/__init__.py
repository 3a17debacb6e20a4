"""Reads, validates, loads, converts and writes checkpoint folders."""
