"""Tests of server/replicas."""
