"""Simulated eviction policies that ``memplus bench eviction`` compares."""

import heapq
from collections.abc import Callable, Mapping
from typing import Protocol

# the clock evicts the row at its hand after this many steps, whatever its use count
_MAX_HAND_STEPS = 4096
# the same constants as in row_slots.h
_SAMPLE_SIZE, _AGING_ROUNDS, _MAX_USES, _ROWS_PER_WORD = 16, 8, 255, 8


class Cache(Protocol):
    """A row cache. Unlike the disk tier, it may evict rows of the current lookup."""

    def use(self, row: int) -> bool:
        """Read a row, loading it on a miss; returns whether it was a hit."""
        ...


class SampledLeastFrequentlyUsed:
    """Evicts the least-used row of a sample, with aging counters, like row_slots.h (disk tier)."""

    def __init__(self, num_slots: int, num_rows: int) -> None:
        self._num_slots, self._num_words = num_slots, -(-num_rows // _ROWS_PER_WORD)
        self._hand = self._next_word = self._due = 0
        self._slots: dict[int, int] = {}
        self._rows: list[int] = []
        self._uses = [0] * (self._num_words * _ROWS_PER_WORD)

    def use(self, row: int) -> bool:
        self._uses[row] = min(self._uses[row] + 1, _MAX_USES)
        if row in self._slots:
            return True
        if len(self._rows) < self._num_slots:
            self._slots[row] = len(self._rows)
            self._rows.append(row)
        else:
            sample_size = min(_SAMPLE_SIZE, self._num_slots)
            sample = [(self._hand + i) % self._num_slots for i in range(sample_size)]
            slot = min(sample, key=lambda slot: self._uses[self._rows[slot]])
            self._hand = (self._hand + sample_size) % self._num_slots
            del self._slots[self._rows[slot]]
            self._rows[slot], self._slots[row] = row, slot
        self._age()
        return False

    def _age(self) -> None:
        self._due += self._num_words
        while self._due >= _AGING_ROUNDS * self._num_slots:
            self._due -= _AGING_ROUNDS * self._num_slots
            first = self._next_word * _ROWS_PER_WORD
            for row in range(first, first + _ROWS_PER_WORD):
                self._uses[row] //= 2
            self._next_word = (self._next_word + 1) % self._num_words


class Clock:
    """The CLOCK policy with use counters up to a limit, which the hand decrements."""

    def __init__(self, num_slots: int, max_uses: int) -> None:
        self._max_uses, self._hand = max_uses, 0
        self._slots: dict[int, int] = {}
        self._rows, self._uses = [-1] * num_slots, [0] * num_slots

    def use(self, row: int) -> bool:
        slot = self._slots.get(row)
        if slot is None:
            self._insert(row)
            return False
        if self._uses[slot] < self._max_uses:
            self._uses[slot] += 1
        return True

    def _insert(self, row: int) -> None:
        slot, uses, size, steps = self._hand, self._uses, len(self._rows), 0
        while uses[slot] and steps < _MAX_HAND_STEPS:
            uses[slot] -= 1
            slot = slot + 1 if slot + 1 < size else 0
            steps += 1
        self._slots.pop(self._rows[slot], None)
        self._rows[slot], self._slots[row] = row, slot
        uses[slot] = 0
        self._hand = slot + 1 if slot + 1 < size else 0


class LeastRecentlyUsed:
    """Evicts the least recently used row."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._rows: dict[int, None] = {}  # in the order of their last use

    def use(self, row: int) -> bool:
        is_hit = row in self._rows
        if is_hit:
            del self._rows[row]
        elif len(self._rows) == self._num_slots:
            del self._rows[next(iter(self._rows))]
        self._rows[row] = None
        return is_hit


class LeastFrequentlyUsed:
    """Evicts the least frequently used row; among equals, the least recently used one.

    Evicted rows keep their use counts.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots, self._time = num_slots, 0
        self._uses: dict[int, tuple[int, int]] = {}  # use count and time of the last use
        self._rows: set[int] = set()
        # holds past use counts: they only grow, so a stale minimum is put back with its new count
        self._heap: list[tuple[tuple[int, int], int]] = []

    def use(self, row: int) -> bool:
        self._time += 1
        uses = self._uses[row] = self._uses.get(row, (0, 0))[0] + 1, self._time
        if row in self._rows:
            return True
        if len(self._rows) == self._num_slots:
            self._evict()
        self._rows.add(row)
        heapq.heappush(self._heap, (uses, row))
        return False

    def _evict(self) -> None:
        while True:
            uses, row = self._heap[0]
            if uses == self._uses[row]:
                break
            heapq.heapreplace(self._heap, (self._uses[row], row))
        heapq.heappop(self._heap)
        self._rows.remove(row)


# by name: makes a cache from the number of slots and the number of table rows
POLICIES: Mapping[str, Callable[[int, int], Cache]] = {
    "fifo": lambda num_slots, num_rows: Clock(num_slots, 0),
    "lru": lambda num_slots, num_rows: LeastRecentlyUsed(num_slots),
    "clock": lambda num_slots, num_rows: Clock(num_slots, 1),
    "clock-2": lambda num_slots, num_rows: Clock(num_slots, 2),
    "clock-3": lambda num_slots, num_rows: Clock(num_slots, 3),
    "clock-7": lambda num_slots, num_rows: Clock(num_slots, 7),
    "lfu": lambda num_slots, num_rows: LeastFrequentlyUsed(num_slots),
    f"least of {_SAMPLE_SIZE}": SampledLeastFrequentlyUsed,
}
