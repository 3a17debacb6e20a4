"""Sends changes of the block table to the device: a step's inputs hold some, a copy the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.executors.block_tables import BlockIds, BlockRows
from engine.executors.cuda.device import Device

Updates = list[tuple[int, int, int]]


class DeviceBlockTable:
    """The block table on a device, with one row per seat."""

    def __init__(self, table_PB: Tensor, device: Device) -> None:
        """``table_PB`` is int32 ``[seats, most blocks of a sequence]``."""
        self._table_PB, self._device = table_PB, device
        self._rows = BlockRows()

    def updates(self, seats: Sequence[int], block_ids: Sequence[BlockIds]) -> Updates:
        """The (seat, index, block) entries that the device lacks; the caller must send them."""
        return [
            (seat, index, block)
            for seat, first, ids in self._rows.changes(seats, block_ids)
            for index, block in enumerate(ids, first)
        ]

    def forget(self, seats: Sequence[int]) -> None:
        """Send these rows again, because a step that should have written them failed."""
        self._rows.forget(seats)

    def send(self, updates: Updates) -> None:
        """Queue updates that do not fit in a step's inputs."""
        pinned_U3 = self._device.pinned((len(updates), 3), torch.int64)
        pinned_U3.copy_(torch.tensor(updates))

        def write() -> None:
            seats, places, blocks = pinned_U3.to(self._table_PB.device, non_blocking=True).T
            self._table_PB.index_put_((seats, places), blocks.int())

        self._device.queue(write)
