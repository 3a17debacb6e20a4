"""Sends a step's inputs from pinned memory, of which there are two: one is filled, one is read."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.executors.cuda.device import Device, DeviceEvent

_BUFFERS = 2


class Staging:
    """Buffers of 64-bit words: two on the host, by turns, and one on the device."""

    def __init__(self, device: Device, num_words: int) -> None:
        self._device = device
        self._pinned = [device.pinned((num_words,), torch.int64) for _ in range(_BUFFERS)]
        self._sent: list[DeviceEvent | None] = [None] * _BUFFERS
        self._next = 0
        self.words: Tensor = torch.zeros(num_words, dtype=torch.int64, device=device.torch_device)

    def send(self, num_words: int, write: Callable[[Tensor], None]) -> None:
        """Let ``write`` fill the first words on the host, and queue their copy to ``words``."""
        index, self._next = self._next, (self._next + 1) % _BUFFERS
        pinned = self._pinned[index][:num_words]
        sent = self._sent[index]
        if sent is not None:
            sent.wait()
        write(pinned)
        words = self.words[:num_words]
        self._device.queue(lambda: _copy(words, pinned))
        self._sent[index] = self._device.record()


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)
