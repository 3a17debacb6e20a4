"""Exporters to other model formats, one module per format."""
