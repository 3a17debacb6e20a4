"""Behaviour, stated as tests; the tree mirrors the packages."""
