"""Code that the exporter copies into folders for transformers; it imports nothing of memplus."""
