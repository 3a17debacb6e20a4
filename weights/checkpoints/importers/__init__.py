"""Importers of other model formats, one module per format."""
