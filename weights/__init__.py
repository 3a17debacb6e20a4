"""Makes, stores and converts the numbers: checkpoint folders, importers, tokenizers."""
