"""Fake CUDA streams: tests run their queued work in any order that the events allow."""

from collections import deque
from collections.abc import Callable

from torch import Tensor

from memory_ops.tables.streams import StreamPair

# the place of streams that write to memory after another stream released it
REUSER = -1
Tasks = deque["FakeEvent | Callable[[], None]"]
Choice = Callable[[list["FakeStream"]], "FakeStream"]


class FakeEvent:
    """An event that is over once its stream has reached it."""

    def __init__(self) -> None:
        self.is_over = False

    def end(self) -> None:
        self.is_over = True

    def query(self) -> bool:
        return self.is_over


class FakeDevice:
    """A set of streams and the order in which they run.

    Attributes:
        side: the side stream..
        caller: the one that is current.
        waits: how often a stream was told to wait, or to keep a tensor.
        kept: what it was told to keep.
    """

    def __init__(self, ignored: int = -1) -> None:
        """``ignored``: which wait, counted from 0, is left out."""
        self.side, self.caller = FakeStream(self, 0), FakeStream(self, 1)
        self.streams = [self.side, self.caller]
        self.waits = 0
        self.kept: list[Tensor] = []
        self._ignored = ignored
        self._keepers: list[tuple[Tensor, FakeStream]] = []

    def pair(self) -> StreamPair:
        return StreamPair(lambda: self.caller, self.side)

    def another_caller(self) -> "FakeStream":
        others = [stream for stream in self.streams if stream.place != REUSER]
        stream = FakeStream(self, len(others))
        self.streams.append(stream)
        return stream

    def should_wait(self) -> bool:
        self.waits += 1
        return self.waits - 1 != self._ignored

    def keep(self, tensor: Tensor, stream: "FakeStream") -> None:
        self.kept.append(tensor)
        if self.should_wait():
            self._keepers.append((tensor, stream))

    def reuse(self, tensor: Tensor, write: Callable[[], None]) -> None:
        """Release a tensor of the caller's stream: the next owner of its memory runs ``write``.

        ``write`` runs on a new stream, after the caller's work so far and after the streams that
        keep the tensor. The caller's stream does not wait for it.
        """
        reuser = FakeStream(self, REUSER)
        keepers = [stream for kept, stream in self._keepers if kept is tensor]
        reuser.tasks.extend(stream.record() for stream in (self.caller, *keepers))
        reuser.run(write)
        self.streams.append(reuser)

    def capture(self, give: Callable[[], None]) -> list[Tasks]:
        """A graph: what ``give`` gives to the caller's stream, then to the one beside it."""
        streams = (self.caller, self.side)
        before = [stream.tasks for stream in streams]
        for stream in streams:
            stream.tasks = deque()
        give()
        graph = [stream.tasks for stream in streams]
        for stream, tasks in zip(streams, before, strict=True):
            stream.tasks = tasks
        return graph

    def replay(self, graph: list[Tasks], branch_place: int) -> None:
        """Queue a graph on the caller's stream; its branch waits for that stream only."""
        own, side = _with_new_events(graph)
        branch = FakeStream(self, branch_place)
        branch.tasks.extend((self.caller.record(), *side))
        self.caller.tasks.extend((*own, branch.record()))
        self.streams.append(branch)

    def run(self, choose: Choice) -> None:
        """Run all work step by step; ``choose`` picks the next of the ready streams."""
        while any(stream.tasks for stream in self.streams):
            ready = [stream for stream in self.streams if stream.is_ready()]
            assert ready, "streams wait for each other"
            choose(ready).step()


class HostCaller:
    """A synchronous caller, like a CPU: it runs its work at once; waiting runs the device."""

    def __init__(self, device: FakeDevice, choose: Choice) -> None:
        self._device, self._choose = device, choose

    def record(self) -> FakeEvent:
        event = FakeEvent()
        event.end()
        return event

    def wait(self, event: FakeEvent) -> None:
        self._device.run(self._choose)
        assert event.is_over

    def run(self, work: Callable[[], None]) -> None:
        work()

    def keep(self, tensor: Tensor) -> None: ...

    def is_idle(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class FakeStream:
    """The ``place``-th stream of a device: a queue of work in first-in, first-out order."""

    def __init__(self, device: FakeDevice, place: int) -> None:
        self.place = place
        self.tasks: Tasks = deque()
        self._device = device

    def record(self) -> FakeEvent:
        event = FakeEvent()
        self.tasks.append(event.end)
        return event

    def wait(self, event: FakeEvent) -> None:
        if self._device.should_wait():
            self.tasks.append(event)

    def run(self, work: Callable[[], None]) -> None:
        self.tasks.append(work)

    def keep(self, tensor: Tensor) -> None:
        self._device.keep(tensor, self)

    def is_idle(self) -> bool:
        return not self.tasks

    def synchronize(self) -> None:
        while self.tasks:
            self._device.run(lambda ready: ready[0])

    def is_ready(self) -> bool:
        if not self.tasks:
            return False
        task = self.tasks[0]
        return not isinstance(task, FakeEvent) or task.is_over

    def step(self) -> None:
        task = self.tasks.popleft()
        if not isinstance(task, FakeEvent):
            task()


def _with_new_events(graph: list[Tasks]) -> list[Tasks]:
    """The same tasks with new events, so that no earlier replay has ended them."""
    events: dict[FakeEvent, FakeEvent] = {}

    def renewed(task: FakeEvent | Callable[[], None]) -> FakeEvent | Callable[[], None]:
        if isinstance(task, FakeEvent):
            return events.setdefault(task, FakeEvent())
        event = getattr(task, "__self__", None)
        return events.setdefault(event, FakeEvent()).end if isinstance(event, FakeEvent) else task

    return [deque(renewed(task) for task in tasks) for tasks in graph]
