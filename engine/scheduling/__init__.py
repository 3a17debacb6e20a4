"""Scheduling: which tokens of which sequences a step runs, and the KV blocks they use."""
