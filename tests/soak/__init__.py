"""Load tests of the real server, run by ``make soak``."""
