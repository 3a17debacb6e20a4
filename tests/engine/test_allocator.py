"""Freed memory is kept: the next block of the same size needs no fresh pages."""

import subprocess
import sys

COUNT = """
import resource, torch
from engine.allocator import keep_freed_memory
keep = {keep}
assert not keep or keep_freed_memory()
for _ in range(3):
    torch.full((4_000_000,), 1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.full((4_000_000,), 1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    command = [sys.executable, "-c", COUNT.format(keep=keep)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_blocks_of_16_mb_are_not_faulted_in_again():
    # 20 blocks of 16 MB are 80,000 small or 160 huge pages
    assert faults(keep=True) < 100
