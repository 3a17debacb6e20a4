"""``memplus bench train-run``: speed of training runs, and the parts of a step."""
