"""Tests of memplus; the folders mirror the packages.

pytest imports this file before torch, so it sets torch's thread count and waiting policy like the
command line does.
"""

from server.config import ThreadOptions, set_threads

set_threads(ThreadOptions())
