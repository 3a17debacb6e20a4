"""``memplus bench memory``: tokens per second by memory size, tier and access skew."""
