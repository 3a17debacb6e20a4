"""Host memory that a GPU reads where it is: page-locked in place, never copied."""

import torch
from torch import Tensor

# cudaHostRegisterPortable, cudaHostRegisterMapped
_FLAGS = 1 | 2


class PageLockError(RuntimeError):
    """The system does not page-lock so much memory: the message says how much, and why."""


class PageLock:
    """Holds a tensor's memory where it is, so that a GPU may read it, until ``close``.

    torch's own pinned tensors would be a second copy, in a block whose size is rounded up to a
    power of two. Not run on a GPU.
    """

    def __init__(self, memory: Tensor, device: torch.device) -> None:
        """Lock the pages of a contiguous CPU tensor for ``device``, a GPU.

        Raises:
            PageLockError: CUDA does not lock them.
        """
        self._memory: Tensor | None = None
        self._device = device
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, _FLAGS)
        if status != cudart.cudaError.success:
            why = cudart.cudaGetErrorString(status)
            raise PageLockError(f"{memory.nbytes} bytes of host memory are not page-locked: {why}")
        self._memory = memory

    def close(self) -> None:
        """Wait for what the device was given, then unlock the pages. A second time, nothing."""
        memory, self._memory = self._memory, None
        if memory is not None:
            torch.cuda.synchronize(self._device)
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]

    def __del__(self) -> None:
        self.close()
