"""Streams whose work waits until a test lets it run, in any order that their events allow."""

from collections import deque
from collections.abc import Callable

from torch import Tensor

from memory_ops.tables.streams import StreamPair

# the place of streams that got another's memory
HEIR = -1
Tasks = deque["FakeEvent | Callable[[], None]"]
Choice = Callable[[list["FakeStream"]], "FakeStream"]


class FakeEvent:
    """Over when its stream comes to it."""

    def __init__(self) -> None:
        self.is_over = False

    def end(self) -> None:
        self.is_over = True


class FakeDevice:
    """Streams, and the order in which they get on.

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
        others = [stream for stream in self.streams if stream.place != HEIR]
        stream = FakeStream(self, len(others))
        self.streams.append(stream)
        return stream

    def is_heeded(self) -> bool:
        self.waits += 1
        return self.waits - 1 != self._ignored

    def keep(self, tensor: Tensor, stream: "FakeStream") -> None:
        self.kept.append(tensor)
        if self.is_heeded():
            self._keepers.append((tensor, stream))

    def reuse(self, tensor: Tensor, write: Callable[[], None]) -> None:
        """The caller's stream has no use for a tensor any more: its memory's next owner writes.

        That is anybody who comes after what the caller's stream was given until now, and after
        those that keep the tensor: a stream of its own, on which the caller's does not wait.
        """
        heir = FakeStream(self, HEIR)
        keepers = [stream for kept, stream in self._keepers if kept is tensor]
        heir.tasks.extend(stream.record() for stream in (self.caller, *keepers))
        heir.run(write)
        self.streams.append(heir)

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
        """Give the caller's stream a graph: its branch follows that stream, and no other."""
        own, beside = _anew(graph)
        branch = FakeStream(self, branch_place)
        branch.tasks.extend((self.caller.record(), *beside))
        self.caller.tasks.extend((*own, branch.record()))
        self.streams.append(branch)

    def run(self, choose: Choice) -> None:
        """Get through all work, step by step, on the stream that is chosen among those that can."""
        while any(stream.tasks for stream in self.streams):
            able = [stream for stream in self.streams if stream.is_able()]
            assert able, "streams wait for each other"
            choose(able).step()


class HostCaller:
    """A caller whose own work is done at once, as a CPU does it: waiting is getting on."""

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


class FakeStream:
    """Work in the order in which it was given, on the ``place``-th stream of a device."""

    def __init__(self, device: FakeDevice, place: int) -> None:
        self.place = place
        self.tasks: Tasks = deque()
        self._device = device

    def record(self) -> FakeEvent:
        event = FakeEvent()
        self.tasks.append(event.end)
        return event

    def wait(self, event: FakeEvent) -> None:
        if self._device.is_heeded():
            self.tasks.append(event)

    def run(self, work: Callable[[], None]) -> None:
        self.tasks.append(work)

    def keep(self, tensor: Tensor) -> None:
        self._device.keep(tensor, self)

    def is_able(self) -> bool:
        if not self.tasks:
            return False
        task = self.tasks[0]
        return not isinstance(task, FakeEvent) or task.is_over

    def step(self) -> None:
        task = self.tasks.popleft()
        if not isinstance(task, FakeEvent):
            task()


def _anew(graph: list[Tasks]) -> list[Tasks]:
    """The same tasks with events of their own, which no replay before has ended."""
    events: dict[FakeEvent, FakeEvent] = {}

    def anew(task: FakeEvent | Callable[[], None]) -> FakeEvent | Callable[[], None]:
        if isinstance(task, FakeEvent):
            return events.setdefault(task, FakeEvent())
        event = getattr(task, "__self__", None)
        return events.setdefault(event, FakeEvent()).end if isinstance(event, FakeEvent) else task

    return [deque(anew(task) for task in tasks) for tasks in graph]
