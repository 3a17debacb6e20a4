"""Grammars for structured output: translation, and compilation to token masks."""
