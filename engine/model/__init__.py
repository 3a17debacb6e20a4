"""The transformer in plain torch, for training and serving; it imports only memory_ops."""
