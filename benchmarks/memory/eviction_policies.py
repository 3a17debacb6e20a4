"""Which rows a cache keeps: policies that ``memplus bench eviction`` compares, simulated."""

import heapq
from collections.abc import Callable, Mapping
from typing import Protocol

# of the hand, after which a row goes however often it was used
_PATIENT_STEPS = 4096
# as in row_slots.h
_LOOKED_AT, _AGING_ROUNDS, _MOST_USES, _ROWS_A_WORD = 16, 8, 255, 8


class Cache(Protocol):
    """Rows that are kept. Unlike in the disk tier, those of the lookup itself may be given up."""

    def use(self, row: int) -> bool:
        """Whether the row was there; it is from now on."""
        ...


class LeastUsedOfSome:
    """Of some rows the one of fewest uses is given up: what the disk tier does, see row_slots.h."""

    def __init__(self, num_slots: int, num_rows: int) -> None:
        self._num_slots, self._num_words = num_slots, -(-num_rows // _ROWS_A_WORD)
        self._hand = self._aged = self._due = 0
        self._slots: dict[int, int] = {}
        self._rows: list[int] = []
        self._uses = [0] * (self._num_words * _ROWS_A_WORD)

    def use(self, row: int) -> bool:
        self._uses[row] = min(self._uses[row] + 1, _MOST_USES)
        if row in self._slots:
            return True
        if len(self._rows) < self._num_slots:
            self._slots[row] = len(self._rows)
            self._rows.append(row)
        else:
            seen = min(_LOOKED_AT, self._num_slots)
            some = [(self._hand + i) % self._num_slots for i in range(seen)]
            slot = min(some, key=lambda slot: self._uses[self._rows[slot]])
            self._hand = (self._hand + seen) % self._num_slots
            del self._slots[self._rows[slot]]
            self._rows[slot], self._slots[row] = row, slot
        self._age()
        return False

    def _age(self) -> None:
        self._due += self._num_words
        while self._due >= _AGING_ROUNDS * self._num_slots:
            self._due -= _AGING_ROUNDS * self._num_slots
            first = self._aged * _ROWS_A_WORD
            for row in range(first, first + _ROWS_A_WORD):
                self._uses[row] //= 2
            self._aged = (self._aged + 1) % self._num_words


class Clock:
    """Rows count their uses, to a limit, and a hand takes them off."""

    def __init__(self, num_slots: int, most_uses: int) -> None:
        self._most_uses, self._hand = most_uses, 0
        self._slots: dict[int, int] = {}
        self._rows, self._uses = [-1] * num_slots, [0] * num_slots

    def use(self, row: int) -> bool:
        slot = self._slots.get(row)
        if slot is None:
            self._take(row)
            return False
        if self._uses[slot] < self._most_uses:
            self._uses[slot] += 1
        return True

    def _take(self, row: int) -> None:
        slot, uses, size, steps = self._hand, self._uses, len(self._rows), 0
        while uses[slot] and steps < _PATIENT_STEPS:
            uses[slot] -= 1
            slot = slot + 1 if slot + 1 < size else 0
            steps += 1
        self._slots.pop(self._rows[slot], None)
        self._rows[slot], self._slots[row] = row, slot
        uses[slot] = 0
        self._hand = slot + 1 if slot + 1 < size else 0


class LeastRecentlyUsed:
    """The row whose last use is longest ago is given up."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._rows: dict[int, None] = {}  # in the order of their last uses

    def use(self, row: int) -> bool:
        is_there = row in self._rows
        if is_there:
            del self._rows[row]
        elif len(self._rows) == self._num_slots:
            del self._rows[next(iter(self._rows))]
        self._rows[row] = None
        return is_there


class LeastFrequentlyUsed:
    """The row of fewest uses is given up, of such the one unused for longest.

    Uses of rows that were given up are remembered.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots, self._time = num_slots, 0
        self._uses: dict[int, tuple[int, int]] = {}  # how many, and when the last
        self._rows: set[int] = set()
        # as they were when it was made: uses only grow, so the least may have to be put back
        self._heap: list[tuple[tuple[int, int], int]] = []

    def use(self, row: int) -> bool:
        self._time += 1
        uses = self._uses[row] = self._uses.get(row, (0, 0))[0] + 1, self._time
        if row in self._rows:
            return True
        if len(self._rows) == self._num_slots:
            self._give_up()
        self._rows.add(row)
        heapq.heappush(self._heap, (uses, row))
        return False

    def _give_up(self) -> None:
        while True:
            uses, row = self._heap[0]
            if uses == self._uses[row]:
                break
            heapq.heapreplace(self._heap, (self._uses[row], row))
        heapq.heappop(self._heap)
        self._rows.remove(row)


# by their names: caches of so many slots, for a table of so many rows
POLICIES: Mapping[str, Callable[[int, int], Cache]] = {
    "fifo": lambda num_slots, num_rows: Clock(num_slots, 0),
    "lru": lambda num_slots, num_rows: LeastRecentlyUsed(num_slots),
    "clock": lambda num_slots, num_rows: Clock(num_slots, 1),
    "clock-2": lambda num_slots, num_rows: Clock(num_slots, 2),
    "clock-3": lambda num_slots, num_rows: Clock(num_slots, 3),
    "clock-7": lambda num_slots, num_rows: Clock(num_slots, 7),
    "lfu": lambda num_slots, num_rows: LeastFrequentlyUsed(num_slots),
    f"least of {_LOOKED_AT}": LeastUsedOfSome,
}
