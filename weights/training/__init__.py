"""Training: data, optimisers, the training loop, its run folder, and evaluation."""
