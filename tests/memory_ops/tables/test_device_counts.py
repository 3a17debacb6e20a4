"""Counters read without waiting, on fake streams."""

import torch

from memory_ops.tables.device_counts import DeviceCounts
from tests.memory_ops.fake_streams import FakeDevice


class Counted:
    """A fake device whose side stream adds to counters on behalf of the caller."""

    def __init__(self) -> None:
        self.device = FakeDevice()
        self.totals = torch.zeros(2, 3, dtype=torch.int64)
        self._counts = DeviceCounts(self.totals)

    def look_up(self) -> None:
        """Queue an increment on the side stream; the caller's stream waits for it."""
        caller, side = self.device.caller, self.device.side
        side.wait(caller.record())
        side.run(lambda: self.totals.add_(1))
        caller.wait(side.record())

    def read(self) -> int:
        (first, *_), *_ = values = self._counts.read(self.device.pair())
        assert values == [[first] * 3] * 2
        return first

    def finish(self) -> None:
        self.device.run(lambda ready: ready[-1])


def test_an_idle_device_gives_exact_values_and_queues_nothing():
    counted = Counted()
    assert counted.read() == 0
    counted.look_up()
    counted.finish()
    assert counted.read() == 1
    assert counted.device.caller.is_idle() and counted.device.side.is_idle()


def test_a_busy_device_gives_the_values_of_the_last_finished_copy():
    counted = Counted()
    counted.look_up()
    assert counted.read() == 0  # which queues a copy behind the first lookup
    counted.look_up()
    assert counted.read() == 0
    counted.finish()
    counted.look_up()
    # the copy has finished; it does not include the second lookup, which was queued after it
    assert counted.read() == 1
    counted.finish()
    counted.look_up()
    assert counted.read() == 3
    counted.finish()
    assert counted.read() == 4


def test_one_copy_is_in_flight_at_a_time():
    counted = Counted()
    counted.look_up()
    counted.read()
    queued = len(counted.device.caller.tasks)
    counted.read()
    assert len(counted.device.caller.tasks) == queued


def test_a_copy_on_a_stream_that_is_no_longer_current_is_awaited():
    counted = Counted()
    counted.look_up()
    assert counted.read() == 0
    before, counted.device.caller = counted.device.caller, counted.device.another_caller()
    while not counted.device.side.is_idle():
        ready = [one for one in (before, counted.device.side) if one.is_ready()]
        ready[-1].step()
    # both current streams are idle, but the copy has not run
    assert not before.is_idle() and counted.read() == 0
    counted.finish()
    assert counted.read() == 1
