"""A device on the CPU that runs queued work as late as it may, and can skip a wait."""

from collections import deque
from collections.abc import Callable

import torch

from engine.executors.cuda.device import Work
from memory_ops.tables.host_calls import Cut


class FakeDevice:
    """Work runs when an event behind it is waited for; until then the host may spoil its inputs.

    Attributes:
        is_ahead: run work at once instead, so that results are written as early as they may be.
        num_replays: how many steps were replayed.
        num_cuts: how often the host worked between two graphs of a step.
        num_waits: how often the host waited for an event that was not over.
        ignored_wait: which of these waits, counted from 0, is left out.
    """

    torch_device = torch.device("cpu")
    num_processors = 2

    def __init__(self) -> None:
        self.is_ahead = False
        self.num_replays = self.num_cuts = self.num_waits = 0
        self.ignored_wait = -1
        self._queued: deque[Work | FakeEvent] = deque()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        # contents that no step may read
        return torch.full(shape, 77, dtype=dtype)

    def queue(self, work: Work) -> None:
        self._queued.append(work)

    def record(self) -> "FakeEvent":
        event = FakeEvent(self)
        self._queued.append(event)
        if self.is_ahead:
            self._run_to(event)
        return event

    def synchronize(self) -> None:
        """Does nothing: the host writes tensors at once."""

    def memory_bytes(self) -> int:
        return 0

    def capture(self, work: Callable[[Cut], None]) -> Work:
        def replay() -> None:
            self.num_replays += 1
            work(self._cut)

        return replay

    def _cut(self, work: Work) -> None:
        self.num_cuts += 1
        work()

    def run_to(self, event: "FakeEvent") -> None:
        """Run all work before an event, unless this wait is the ignored one."""
        if event.is_over:
            return
        self.num_waits += 1
        if self.num_waits - 1 != self.ignored_wait:
            self._run_to(event)

    def _run_to(self, event: "FakeEvent") -> None:
        while not event.is_over:
            first = self._queued.popleft()
            if isinstance(first, FakeEvent):
                first.is_over = True
            else:
                # the host's mode does not matter to a device
                with torch.inference_mode():
                    first()


class FakeEvent:
    """A point in the queue of a fake device."""

    def __init__(self, device: FakeDevice) -> None:
        self.is_over = False
        self._device = device

    def wait(self) -> None:
        self._device.run_to(self)
