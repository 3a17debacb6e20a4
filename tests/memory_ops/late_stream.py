"""A stream that works as late as it may, and graphs of its work with the host's work between."""

from collections import deque
from collections.abc import Callable

from torch import Tensor

from memory_ops.tables.host_calls import HostCalls

Work = Callable[[], None]
Tape = list[tuple[bool, Work]]


class LateEvent:
    """A point in the work of a late stream."""

    def __init__(self, stream: "LateStream") -> None:
        self.is_over = False
        self._stream = stream

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self._stream.run_to(self)


class LateStream:
    """Runs work when the host waits for an event behind it, and never earlier.

    Attributes:
        waits: how often the host waited for an event.
        ignored: which of these waits, counted from 0, is left out.
    """

    def __init__(self, ignored: int = -1) -> None:
        self.waits, self.ignored = 0, ignored
        self._queued: deque[Work | LateEvent] = deque()
        self._tape: Tape | None = None

    def run(self, work: Work) -> None:
        if self._tape is None:
            self._queued.append(work)
        else:
            self._tape.append((True, work))

    def record(self) -> LateEvent:
        assert self._tape is None, "the host cannot wait for an event of a graph"
        event = LateEvent(self)
        self._queued.append(event)
        return event

    def wait(self, event: object) -> None:
        raise AssertionError("there is one stream")

    def keep(self, tensor: object) -> None: ...

    def is_idle(self) -> bool:
        return not self._queued

    def run_to(self, event: LateEvent) -> None:
        self.waits += 1
        if self.waits - 1 == self.ignored:
            return
        while not event.is_over:
            first = self._queued.popleft()
            if isinstance(first, LateEvent):
                first.is_over = True
            else:
                first()

    def finish(self) -> None:
        """Run everything that is left."""
        self.ignored = -1
        self.record().synchronize()

    def capture(self, calls: HostCalls, work: Callable[[], Tensor]) -> tuple[Tensor, Work]:
        """Record what ``work`` queues and calls.

        Returns its result, and a replay that runs only what was recorded.
        """
        tape: Tape = []
        self._tape = tape
        with calls.capture(lambda host: tape.append((False, host))):
            result = work()
        self._tape = None

        def replay() -> None:
            for is_on_device, one in tape:
                if is_on_device:
                    self.run(one)
                else:
                    one()

        return result, replay


class PromptStream(LateStream):
    """Runs work at once."""

    def run(self, work: Work) -> None:
        work()

    def wait(self, event: object) -> None:
        """Does nothing: everything is done."""

    def is_idle(self) -> bool:
        return True
