"""Creates, stores and converts weights: checkpoint folders, importers, tokenizers, training."""
