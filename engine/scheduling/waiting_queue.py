"""Queue of the sequences that wait to run, in the order of service."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from engine.scheduling.sequence import Sequence


class WaitingQueue:
    """Waiting sequences, sorted by their turns; a request id finds its sequence at once."""

    def __init__(self) -> None:
        self._in_order: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._in_order)

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences at this moment; the queue may change meanwhile."""
        return iter(tuple(self._in_order))

    def add(self, sequence: Sequence) -> None:
        """Add a sequence at its turn."""
        insort(self._in_order, sequence, key=_turn)
        self._by_id[sequence.request_id] = sequence

    def remove(self, request_id: str) -> None:
        """Remove a request's sequence; do nothing if it does not wait."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is not None:
            del self._in_order[bisect_left(self._in_order, sequence.turn, key=_turn)]


def _turn(sequence: Sequence) -> tuple[int, int]:
    return sequence.turn
