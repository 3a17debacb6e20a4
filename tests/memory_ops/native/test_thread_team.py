"""The team of threads of all native libraries: one for all, any number of threads, after a fork."""

import os
import signal
import threading

import pytest
import torch

from engine.executors.cpu.kernels import CPU_LIBRARY
from memory_ops.native.backend import NativeBackend
from memory_ops.native.library import MEMORY_LIBRARY

LIBRARIES = (MEMORY_LIBRARY, CPU_LIBRARY)
TABLE, ROWS, WEIGHTS = torch.randn(999, 64), torch.randint(0, 999, (50, 2, 8)), torch.rand(50, 2, 8)


@pytest.fixture
def backend():
    before = torch.get_num_threads()
    yield NativeBackend(MEMORY_LIBRARY.best_build)
    torch.set_num_threads(before)


def sums(backend):
    return backend.gather_rows(TABLE, ROWS, WEIGHTS)


def test_all_builds_of_all_libraries_share_one_team():
    teams = {
        library.load(build).memplus_team()
        for library in LIBRARIES
        for build in library.runnable_builds
    }
    assert len(teams) == 1


@pytest.mark.parametrize("counts", [(1, 2, 7, 3, 1, 16, 2)])
def test_the_number_of_threads_may_change_between_calls(backend, counts):
    torch.set_num_threads(1)
    expected = sums(backend)
    for count in counts:
        torch.set_num_threads(count)
        for _ in range(20):
            assert torch.equal(sums(backend), expected)


def test_threads_that_call_at_the_same_time_take_turns(backend):
    torch.set_num_threads(3)
    expected, wrong = sums(backend), []

    def call():
        torch.set_num_threads(3)
        wrong.extend(1 for _ in range(50) if not torch.equal(sums(backend), expected))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_forked_process_makes_its_own_threads(backend):
    torch.set_num_threads(2)
    expected = sums(backend)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that hangs
        is_equal = torch.equal(sums(backend), expected)
        num_threads = len(os.listdir("/proc/self/task"))
        # pytest must not run on in the child, whatever happens
        os._exit(0 if is_equal and num_threads == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(sums(backend), expected)
