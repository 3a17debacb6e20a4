"""Checkpoint folders: read, checked, loaded, converted and written."""
