"""The one transformer, for training and for serving. It sees its config, the ops and memory_ops."""
