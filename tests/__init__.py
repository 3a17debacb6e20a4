"""Behaviour, stated as tests; the tree mirrors the packages.

Imported before any test, and so before torch, which it tells how many threads to use and how they
wait: as the command does.
"""

from server.config import ThreadOptions, set_threads

set_threads(ThreadOptions())
