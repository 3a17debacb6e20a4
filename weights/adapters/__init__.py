"""Memory adapters: memory layers with their tables, without the model that they belong to."""
