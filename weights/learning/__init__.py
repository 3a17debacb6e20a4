"""Teaches a model facts: learns row patches from texts."""
