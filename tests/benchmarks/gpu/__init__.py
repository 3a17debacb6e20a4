"""Tests of ``memplus bench gpu``; none asserts on speed."""
