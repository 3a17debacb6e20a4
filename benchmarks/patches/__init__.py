"""``memplus bench patches``: what row patches cost."""
