"""Executors: how a served step of a model is computed on a device."""
