"""``memplus bench memory``: tokens a second per memory size, tier and access skew."""
