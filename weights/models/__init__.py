"""Named models: the ones that memplus ships or can install."""
