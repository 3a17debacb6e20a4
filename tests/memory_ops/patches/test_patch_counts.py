"""Counts of many patches: on the CPU, and on a fake device that is still at work."""

import gc
import weakref

import torch

from memory_ops.patches.patch_counts import CountReader
from memory_ops.patches.patched_rows import PatchedRows
from tests.memory_ops.fake_streams import FakeDevice


def rows() -> PatchedRows:
    return PatchedRows(torch.arange(2), torch.zeros(2, 4))


def test_counts_of_a_patch_are_sums_over_its_tables():
    first, second, third = rows(), rows(), rows()
    first.counts += torch.tensor([5, 2])
    second.counts += torch.tensor([7, 3])
    reader = CountReader()
    assert reader.read([[first, second], [], [third]]) == [(12, 5), (0, 0), (0, 0)]
    third.counts += 1
    assert reader.read([[third], [], [second, first]]) == [(1, 1), (0, 0), (12, 5)]
    assert reader.read([]) == [] and reader.read([[], []]) == [(0, 0)] * 2


class Counted:
    """Patches whose counts a stream of a fake device increases."""

    def __init__(self, number: int) -> None:
        self.device, self.reader = FakeDevice(), CountReader()
        self.rows = [rows() for _ in range(number)]

    def use(self) -> None:
        """Queue a read of a row, a hit, by a token that uses all patches."""
        counts = [one.counts for one in self.rows]
        self.device.caller.run(lambda: [one.add_(1) for one in counts])

    def read(self) -> list[int]:
        counts = self.reader.read_device(self.rows, self.device.pair())
        assert all(reads == hits for reads, hits in counts)
        return [reads for reads, _ in counts]

    def finish(self) -> None:
        self.device.run(lambda ready: ready[-1])


def test_an_idle_device_gives_exact_counts_and_queues_nothing():
    counted = Counted(2)
    assert counted.read() == [0, 0]
    counted.use()
    counted.finish()
    assert counted.read() == [1, 1] and counted.device.caller.is_idle()


def test_a_busy_device_gives_the_counts_of_the_last_copy_and_has_one_in_flight():
    counted = Counted(2)
    counted.use()
    assert counted.read() == [0, 0]  # which queues a copy behind the first use
    queued = len(counted.device.caller.tasks)
    assert counted.read() == [0, 0] and len(counted.device.caller.tasks) == queued
    counted.use()
    counted.finish()
    counted.use()
    # the copy does not include the second use; this read queues the next one
    assert counted.read() == [1, 1]
    counted.finish()
    assert counted.read() == [3, 3]


def test_a_copy_finds_its_patches_after_others_came_and_went():
    counted = Counted(3)
    for one, count in zip(counted.rows, (10, 20, 30), strict=True):
        one.counts += count
    counted.use()
    counted.read()
    del counted.rows[0]
    gc.collect()
    counted.rows.insert(1, rows())
    counted.finish()
    counted.use()
    # the new patch has no counts yet, and those of the others do not decrease
    assert counted.read() == [21, 0, 31]
    counted.finish()
    assert counted.read() == [22, 1, 32]


def test_a_copy_in_flight_keeps_no_patch_but_its_counts():
    counted = Counted(1)
    counted.use()
    counted.read()
    sources = counted.reader._copy.sources
    assert sources[0] is counted.rows[0].counts
    alive = weakref.ref(counted.rows.pop())
    gc.collect()
    assert alive() is None
    counted.finish()
    counted.rows.append(rows())
    assert counted.read() == [0]
