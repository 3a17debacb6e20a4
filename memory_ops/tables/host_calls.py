"""Points in a device's work at which the host acts: at once, or between the graphs of a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

HostWork = Callable[[], None]
# ends a graph, and lets the host work before the next graph, at each replay
Cut = Callable[[HostWork], None]


class HostCalls:
    """Runs work of the host in the order of the device's work; tables of one model share it.

    Outside of captures, work runs at once. Inside, the graph is cut: each replay runs the work
    between two graphs.

    Attributes:
        is_capturing: whether graphs are being captured.
    """

    def __init__(self) -> None:
        self._cut: Cut | None = None
        self._delayed: list[HostWork] = []
        self._due: list[HostWork] = []

    @property
    def is_capturing(self) -> bool:
        return self._cut is not None

    def call(self, work: HostWork) -> None:
        """Run ``work`` when the host has launched everything before this point.

        It must not wait for the device longer than the caller may wait.
        """
        if self._cut is None:
            work()
        else:
            self._cut(work)

    def delay(self, work: HostWork) -> None:
        """Run ``work`` at the first ``catch_up`` after the next ``mark``, when the host has
        launched more of the step."""
        self._delayed.append(work)

    def mark(self) -> None:
        """Let the next ``catch_up`` run what has been delayed so far.

        Its caller waits for the device's work up to here. Work that is delayed later may wait for
        more of the device's work, so it runs later.
        """
        self._due += self._delayed
        self._delayed.clear()

    def catch_up(self) -> None:
        """Run the work that is due, in its order."""
        while self._due:
            self._due.pop(0)()

    def drop_delayed(self) -> None:
        """Drop the delayed work of a step that failed."""
        self._delayed.clear()
        self._due.clear()

    @contextmanager
    def capture(self, cut: Cut) -> Iterator[None]:
        """Use ``cut`` for the calls of a capture."""
        self._cut = cut
        try:
            yield
        finally:
            self._cut = None
