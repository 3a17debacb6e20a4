"""Training: data, optimisers, the loop and its run folder."""
