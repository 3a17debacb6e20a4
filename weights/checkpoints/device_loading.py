"""Loads tensors from files into a device's memory through two alternating host buffers."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from weights.checkpoints.tensor_files import PART_BYTES, StoredTensor, read_parts

_BUFFERS = 2

OnBytes = Callable[[int], object]
# queues a copy of a part in host memory, and returns a call that waits for this copy
StartCopy = Callable[[Tensor, Tensor], Callable[[], None]]


def start_copy(part: Tensor, target: Tensor) -> Callable[[], None]:
    """Queue a copy on the current stream of the target's device, which also converts the dtype.

    Returns a call that waits for the copy. On other devices than GPUs the copy is already done.
    """
    copy_part(part, target)
    if not target.is_cuda:
        return _do_nothing
    copied: torch.cuda.Event = torch.cuda.current_stream(target.device).record_event()
    return copied.synchronize


def copy_part(part: Tensor, target: Tensor) -> None:
    """Copy a part in its own dtype, then convert it to the target's dtype on the device."""
    if part.dtype is target.dtype:
        target.copy_(part, non_blocking=True)
    else:  # with two dtypes, torch would convert on the host and wait for the copy
        target.copy_(part.to(target.device, non_blocking=True))


class DeviceLoader:
    """Loads tensors one after another; the host reads a part while the device copies the last one.

    Two buffers of 4 MiB are the only host memory, page-locked for a GPU.
    """

    def __init__(self, device: torch.device, start: StartCopy = start_copy) -> None:
        """Allocate the buffers. ``start`` copies parts; tests substitute a fake."""
        self._device, self._start = device, start
        is_pinned = device.type == "cuda"
        self._buffers = [
            torch.empty(PART_BYTES, dtype=torch.uint8, pin_memory=is_pinned)
            for _ in range(_BUFFERS)
        ]
        self._waits: list[Callable[[], None]] = [_do_nothing] * _BUFFERS
        self._current = 0

    def load(
        self,
        stored: StoredTensor,
        dtype: torch.dtype,
        on_bytes: OnBytes = lambda num_bytes: None,
        *,
        verify: bool = False,
    ) -> Tensor:
        """A tensor in the device's memory, in ``dtype``; its last copies may be in flight.

        Args:
            stored: the tensor in its file.
            dtype: a floating dtype, or the stored one.
            on_bytes: called with the bytes of each part of the file that was read.
            verify: compare its data with the checksum in its file.

        Raises:
            CheckpointError: as ``read_parts``.
            torch.OutOfMemoryError: the device has not enough memory.
        """
        loaded = torch.empty(stored.shape, dtype=dtype, device=self._device)
        values, first = loaded.view(-1), 0
        # parts of single elements, so that each fits in a buffer, however large a row is
        elements = replace(stored, shape=tuple(values.shape))
        for part in read_parts(elements, buffer=self._free_buffer, verify=verify):
            target = values[first : first + len(part)]
            self._waits[self._current] = self._start(part, target)
            first += len(part)
            on_bytes(part.nbytes)
        return loaded

    def finish(self) -> None:
        """Wait for all copies, which end in order."""
        self._waits[self._current]()

    def _free_buffer(self) -> Tensor:
        """The buffer to fill next, after the device has copied what it holds."""
        self._current = (self._current + 1) % _BUFFERS
        self._waits[self._current]()
        return self._buffers[self._current]


def _do_nothing() -> None:
    """Wait for no copy."""
