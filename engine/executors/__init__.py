"""Executors: compute the served steps of a model on a device."""
