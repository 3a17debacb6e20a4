"""Replicas of a server behind one address, run by Ray Serve."""
