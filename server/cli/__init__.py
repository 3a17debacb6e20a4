"""The ``memplus`` command line."""
