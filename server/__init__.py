"""HTTP in, HTTP out, and the command line; the one place that joins weights and engine."""
