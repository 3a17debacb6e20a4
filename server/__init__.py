"""The HTTP server and the command line: the only package that joins weights and engine."""
