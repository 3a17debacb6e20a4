"""Freed memory is kept: a step's temporaries need no fresh pages after the first steps."""

import subprocess
import sys

COUNT = """
import resource, torch
from engine.allocator import keep_freed_memory

def faults_of_ten_steps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        logits = torch.randn(32, 49152)
        moved = logits - 1
        weights = (moved / 2).softmax(-1)
        torch.nn.functional.threshold(weights / logits.amax(-1, keepdim=True), 1, 0.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
faults_of_ten_steps()
print(faults_of_ten_steps())
"""


def test_temporaries_of_many_megabytes_are_not_faulted_in_again():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    # without it, the second ten steps took 6,000 faults
    assert int(done.stdout) < 100
