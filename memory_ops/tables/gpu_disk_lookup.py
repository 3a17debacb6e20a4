"""A lookup of a GPU in a table on disk: its parts, and the turns of the device and the host."""

from collections.abc import Callable

from torch import Tensor

from memory_ops.tables.host_calls import HostCalls
from memory_ops.tables.row_cache import PlacedRows
from memory_ops.tables.staged_rows import StagedRows
from memory_ops.tables.streams import Stream

# reads a range of tokens, whose rows lie at these places of the cache
ReadPart = Callable[[slice, Tensor], None]


class StagedParts:
    """Places and fetches the parts of one lookup, where the device and the host get their work."""

    def __init__(
        self,
        staged: StagedRows,
        stream: Callable[[], Stream],
        calls: HostCalls,
        rows_THK: Tensor,
        layer: int,
    ) -> None:
        self._staged, self._stream, self._calls = staged, stream, calls
        self._rows_THK, self._layer = rows_THK, layer
        self._placed: PlacedRows | None = None

    def place(self, part: slice) -> None:
        """Queue the placement of a part, and the copy of its row ids to the host."""

        def work() -> None:
            self._placed = self._staged.place(self._rows_THK[part], self._layer)

        self._stream().run(work)

    def mark(self) -> None:
        """Let the host note what ``place`` queued, so that it waits for nothing behind it."""
        self._calls.call(self._mark)

    def fetch(self, part: slice, *, is_marked: bool) -> None:
        """Let the host fetch a part's missing rows."""
        num_references = self._rows_THK[part].numel()
        is_first, staged, calls, layer = part.start == 0, self._staged, self._calls, self._layer

        def work() -> None:
            if not is_marked:
                self._mark()
            calls.catch_up()
            staged.fetch(num_references, layer, is_first=is_first)

        calls.call(work)

    def read(self, part: slice, read: ReadPart) -> None:
        """Queue a kernel that reads a part's rows."""

        def work() -> None:
            assert self._placed is not None
            read(part, self._placed.places_THK)

        self._stream().run(work)

    def _mark(self) -> None:
        self._staged.mark()
        self._calls.mark()


class GpuDiskLookup:
    """A lookup in flight. Call ``finish`` once.

    The start places the first part alone: one part fills the cache's overflow rows. So only the
    fetches of the first part overlap what the caller launches before ``finish``.
    """

    def __init__(
        self, staged: StagedParts, parts: list[slice], read: ReadPart, result: Tensor
    ) -> None:
        self._staged, self._parts, self._read, self._result = staged, parts, read, result
        if parts:
            staged.place(parts[0])
            staged.mark()

    def finish(self) -> Tensor:
        """Wait for the rows on the host, and return the result, in fp32.

        Raises:
            TableReadError: a row could not be read.
        """
        if not self._parts:
            return self._result.zero_()
        for part in self._parts:
            is_first = part.start == 0
            if not is_first:
                self._staged.place(part)
            self._staged.fetch(part, is_marked=is_first)
            self._staged.read(part, self._read)
        return self._result
