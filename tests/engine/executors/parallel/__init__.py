"""Tests of tensor-parallel ranks."""
