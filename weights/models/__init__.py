"""The models that have a name."""
