"""A plain Python model of the row cache: which row is in which way."""

from dataclasses import dataclass

FACTOR, MODULUS = 0x4F1BBCDCBFA53E0B, 2**63
MOST_USES = 3


@dataclass(frozen=True, order=True)
class Way:
    """One way; ways sort by eviction order: fewest uses, oldest last use, not hinted."""

    uses: int = 0
    last: int = 0
    is_hinted: bool = False
    row: int = -1


class CacheModel:
    """Sets of ways with the counters of lookups and hints.

    Attributes:
        ways: the ways of each set.
        counts: lookups, requested rows, distinct rows, misses, rows fetched for hints, and hinted
            rows that a lookup used.
    """

    def __init__(self, num_sets: int, num_ways: int) -> None:
        self.ways = [[Way()] * num_ways for _ in range(num_sets)]
        self.counts = [0] * 6

    def set_of(self, row: int) -> int:
        return (row * FACTOR % MODULUS >> 32) * len(self.ways) >> 31

    def look_up(self, rows: list[int]) -> dict[int, bool]:
        """By distinct row, whether it was a miss."""
        self.counts[0] += 1
        self.counts[1] += len(rows)
        return self._ask(rows, is_hint=False)

    def hint(self, rows: list[int]) -> None:
        self._ask(rows, is_hint=True)

    def place(self, row: int) -> int | None:
        """Index of a row's way among the ways of all sets; None if the row is not cached."""
        of_set = self.set_of(row)
        rows = [way.row for way in self.ways[of_set]]
        return of_set * len(rows) + rows.index(row) if row in rows else None

    def _ask(self, rows: list[int], is_hint: bool) -> dict[int, bool]:
        missing: dict[int, bool] = {}
        for of_set in range(len(self.ways)):
            asked = [row for row in set(rows) if self.set_of(row) == of_set]
            # missing rows get ways in this order
            asked.sort(key=lambda row: row * FACTOR % MODULUS)
            if asked:
                missing |= self._ask_set(self.ways[of_set], asked, is_hint)
        return missing

    def _ask_set(self, ways: list[Way], asked: list[int], is_hint: bool) -> dict[int, bool]:
        now = max(way.last for way in ways) + 1
        wanted = [i for i, way in enumerate(ways) if way.row in asked]
        present = {ways[i].row for i in wanted}
        missing = [row for row in asked if row not in present]
        others = [i for i in range(len(ways)) if i not in wanted]
        if is_hint:
            others = [i for i in others if not ways[i].uses]
        others.sort(key=lambda i: (ways[i].uses, ways[i].last, ways[i].is_hinted, i))
        filled = dict(zip(others, missing, strict=False))
        lost = max((ways[i].uses for i in filled), default=0)
        if is_hint:
            lost = min(len(missing), 1)
        used = sum(ways[i].is_hinted for i in wanted)
        for i, way in enumerate(ways):
            if i in filled:
                ways[i] = Way(0, now, is_hint, filled[i])
            elif i in wanted and is_hint:
                ways[i] = Way(way.uses, now, way.is_hinted, way.row)
            elif i in wanted:
                ways[i] = Way(min(way.uses + 1, MOST_USES), now, False, way.row)
            else:
                ways[i] = Way(max(way.uses - lost, 0), way.last, way.is_hinted, way.row)
        if is_hint:
            self.counts[4] += len(filled)
        else:
            self.counts[2] += len(asked)
            self.counts[3] += len(missing)
            self.counts[5] += used
        return {row: row in missing for row in asked}
