"""Host memory that a GPU reads where it is: page-locked in place, never copied."""

from contextlib import suppress

import torch
from torch import Tensor

# cudaHostRegisterPortable, cudaHostRegisterMapped
_FLAGS = 1 | 2


class PageLockError(RuntimeError):
    """Memory is not locked, or not unlocked: the message says how much, and why."""


class PageLock:
    """Holds a tensor's memory where it is, so that a GPU may read it, until ``close``.

    torch's own pinned tensors would be a second copy, in a block whose size is rounded up to a
    power of two.
    """

    def __init__(self, memory: Tensor, device: torch.device) -> None:
        """Lock the pages of a contiguous CPU tensor for ``device``, a GPU; of an empty one, none.

        Raises:
            PageLockError: CUDA does not lock them.
        """
        self._memory: Tensor | None = None
        self._device = device
        if not memory.nbytes:
            return
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, _FLAGS)
        if status != cudart.cudaError.success:
            why = cudart.cudaGetErrorString(status)
            _forget_last_error(device)
            raise PageLockError(f"{memory.nbytes} bytes of host memory are not page-locked: {why}")
        self._memory = memory

    def close(self) -> None:
        """Wait for what the device was given, then unlock the pages. A second time, nothing.

        Raises:
            PageLockError: CUDA does not unlock them.
            RuntimeError: the device failed before; the pages are unlocked all the same.
        """
        memory, self._memory = self._memory, None
        if memory is None:
            return
        try:
            torch.cuda.synchronize(self._device)
        finally:
            self._unlock(memory)

    def _unlock(self, memory: Tensor) -> None:
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = cudart.cudaHostUnregister(memory.data_ptr())
        if status != cudart.cudaError.success:
            why = cudart.cudaGetErrorString(status)
            _forget_last_error(self._device)
            raise PageLockError(f"{memory.nbytes} bytes of host memory stay page-locked: {why}")

    def __del__(self) -> None:
        self.close()


def _forget_last_error(device: torch.device) -> None:
    """Have torch take the error of a call that failed: it would blame its next kernel for it.

    torch has no call for that; what is launched here is that next kernel.
    """
    with suppress(RuntimeError):
        torch.ones(1, device=device)
