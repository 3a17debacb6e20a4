"""Reads of the counts that row patches keep, for many patches at once."""

import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memory_ops.patches.patched_rows import PatchedRows
from memory_ops.tables.streams import Event, StreamPair, current_stream


class PatchCounts(NamedTuple):
    """Row reads of the tokens that use a row patch.

    Attributes:
        reads: rows that their memory layers read from tables that the patch changes.
        hits: those among them that the patch changes.
    """

    reads: int
    hits: int


@dataclass(frozen=True)
class _Copy:
    """A copy of counts to pinned memory, in flight.

    Attributes:
        sources: the counts, which must stay in memory until the copy is done.
        rows: whose counts they are; a copy does not keep a patch in memory.
    """

    sources: list[Tensor]
    rows: list["weakref.ref[PatchedRows]"]
    counts_R2: Tensor
    copied: Event


class CountReader:
    """Reads counts of the patches of one device with one copy, and never waits for a GPU.

    If the GPU has work left, a read returns what the last finished copy brought, and queues a new
    copy. Values of later reads are never smaller.
    """

    def __init__(self) -> None:
        self._latest: weakref.WeakKeyDictionary[PatchedRows, list[int]] = (
            weakref.WeakKeyDictionary()
        )
        self._copy: _Copy | None = None

    def read(self, patches: Sequence[Sequence[PatchedRows]]) -> list[tuple[int, int]]:
        """Reads and hits of each patch, given by its rows of each table; see ``PatchCounts``.

        The stream of the work that changes the counts must be the current one.
        """
        rows = list(itertools.chain.from_iterable(patches))
        if not rows or not rows[0].counts.is_cuda:
            # several times as fast as with tensors
            return [_sum([one.host_counts.tolist() for one in patch]) for patch in patches]
        found = iter(self.read_device(rows, current_stream(rows[0].counts.device)))
        return [_sum(itertools.islice(found, len(patch))) for patch in patches]

    def read_device(self, rows: Sequence[PatchedRows], streams: StreamPair) -> list[list[int]]:
        """The counts of rows whose counts the caller's stream changes."""
        if self._copy is not None and self._copy.copied.query():
            self._keep(self._copy.rows, self._copy.counts_R2)
            self._copy = None
        if self._copy is None:
            self._read(rows, streams)
        return [self._latest.get(one, [0, 0]) for one in rows]

    def _read(self, rows: Sequence[PatchedRows], streams: StreamPair) -> None:
        """Read the counts if the stream is idle, or queue their copy."""
        caller = streams.caller()
        sources, references = [one.counts for one in rows], [weakref.ref(one) for one in rows]
        if caller.is_idle():
            self._keep(references, torch.stack(sources))
            return
        # torch reuses pinned memory, so few reads allocate any
        counts_R2 = torch.empty(len(rows), 2, dtype=torch.int64, pin_memory=sources[0].is_cuda)
        caller.run(lambda: _copy(counts_R2, sources))
        self._copy = _Copy(sources, references, counts_R2, caller.record())

    def _keep(self, rows: Sequence["weakref.ref[PatchedRows]"], counts_R2: Tensor) -> None:
        for reference, counts in zip(rows, counts_R2.tolist(), strict=True):
            if (one := reference()) is not None:
                self._latest[one] = counts


def _copy(target: Tensor, sources: list[Tensor]) -> None:
    target.copy_(torch.stack(sources), non_blocking=True)


def _sum(counts: Iterable[list[int]]) -> tuple[int, int]:
    reads = hits = 0
    for more_reads, more_hits in counts:
        reads += more_reads
        hits += more_hits
    return reads, hits
