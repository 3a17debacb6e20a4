"""Block tables: the KV blocks of each sequence, of which only changed entries are written."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

BlockIds = tuple[int, ...]


class BlockRows:
    """Knows which block ids the rows of a table hold, wherever the table is.

    A decoding sequence adds one id every ``block_size`` steps, while a long context has thousands.
    """

    def __init__(self) -> None:
        self._known: dict[int, BlockIds] = {}

    def changes(
        self, rows: Iterable[int], block_ids: Iterable[BlockIds]
    ) -> Iterator[tuple[int, int, BlockIds]]:
        """(row, column, ids) of what the table lacks; the caller must write each as it comes.

        Afterwards each row begins with its ids. If a row's sequence changes, all of them are
        written.
        """
        for row, ids in zip(rows, block_ids, strict=True):
            known = self._known.get(row, ())
            if ids is known:
                continue
            self._known[row] = ids
            same = min(len(ids), len(known))
            if ids[:same] != known[:same]:
                same = 0
            if same < len(ids):
                yield row, same, ids[same:]

    def forget(self, rows: Iterable[int]) -> None:
        """Write these rows again, because writing them failed."""
        for row in rows:
            self._known.pop(row, None)


class HostBlockTable:
    """A block table in host memory, one row for each sequence of a step."""

    def __init__(self) -> None:
        self._ids_SB = np.zeros((0, 0), dtype=np.int64)
        self._rows = BlockRows()

    def update(self, block_ids: Sequence[BlockIds]) -> Tensor:
        """The table of a step, int64 ``[S, largest number of blocks]``, a strided view.

        Entries after a sequence's ids are arbitrary. The next call overwrites the tensor.
        """
        width = max(map(len, block_ids))
        self._reserve(len(block_ids), width)
        for row, first, ids in self._rows.changes(range(len(block_ids)), block_ids):
            self._ids_SB[row, first : first + len(ids)] = ids
        return torch.from_numpy(self._ids_SB[: len(block_ids), :width])

    def _reserve(self, num_rows: int, width: int) -> None:
        old_SB = self._ids_SB
        rows, columns = old_SB.shape
        if num_rows > rows or width > columns:
            # powers of two keep the total cost of growth low
            sizes = max(rows, num_rows), max(columns, width)
            self._ids_SB = np.zeros([1 << (n - 1).bit_length() for n in sizes], dtype=np.int64)
            self._ids_SB[:rows, :columns] = old_SB
