"""Tests of server/plan."""
