"""Follows the block table on the device, of which only changed entries are sent."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.executors.cuda.device import Device

Updates = list[tuple[int, int, int]]


class BlockTables:
    """Knows which KV blocks the device's rows hold, one row per seat."""

    def __init__(self, table_PB: Tensor, device: Device) -> None:
        """Follow a table of zeros, int32 ``[seats, most blocks of a sequence]``."""
        self._table_PB, self._device = table_PB, device
        self._known: list[tuple[int, ...]] = [()] * len(table_PB)

    def updates(self, seats: Sequence[int], block_ids: Sequence[tuple[int, ...]]) -> Updates:
        """The (seat, index, block) entries that the device lacks; the caller must send them."""
        updates: Updates = []
        for seat, ids in zip(seats, block_ids, strict=True):
            known = self._known[seat]
            if ids != known:
                same = len(known) if ids[: len(known)] == known else 0
                updates += [(seat, index, ids[index]) for index in range(same, len(ids))]
                self._known[seat] = ids
        return updates

    def forget(self, seats: Sequence[int]) -> None:
        """Send these rows again, because a step that should have written them failed."""
        for seat in seats:
            self._known[seat] = ()

    def send(self, updates: Updates) -> None:
        """Queue updates that do not fit in a step's inputs."""
        pinned_U3 = self._device.pinned((len(updates), 3), torch.int64)
        pinned_U3.copy_(torch.tensor(updates))

        def write() -> None:
            seats, places, blocks = pinned_U3.to(self._table_PB.device, non_blocking=True).T
            self._table_PB.index_put_((seats, places), blocks.int())

        self._device.queue(write)
