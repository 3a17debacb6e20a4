"""Facts recalled against the size of a memory, at equal compute."""
