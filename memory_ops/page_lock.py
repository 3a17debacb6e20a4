"""Page-locks host memory in place, so that a GPU can read it without a copy."""

from contextlib import suppress

import torch
from torch import Tensor

# cudaHostRegisterPortable, cudaHostRegisterMapped
_FLAGS = 1 | 2


class PageLockError(RuntimeError):
    """CUDA did not lock or unlock memory: the message gives its size and CUDA's reason."""


class PageLock:
    """Keeps a tensor's memory page-locked until ``close``, so that a GPU can read it.

    A pinned torch tensor would be a second copy, with its size rounded up to a power of two.
    """

    def __init__(self, memory: Tensor, device: torch.device) -> None:
        """Lock the pages of a contiguous CPU tensor for ``device``, a GPU; it may be empty.

        Raises:
            PageLockError: CUDA cannot lock them.
        """
        self._memory: Tensor | None = None
        self._device = device
        if not memory.nbytes:
            return
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, _FLAGS)
        if status != cudart.cudaError.success:
            why = cudart.cudaGetErrorString(status)
            _clear_last_error(device)
            raise PageLockError(f"cannot page-lock {memory.nbytes} bytes of host memory: {why}")
        self._memory = memory

    def close(self) -> None:
        """Wait for the device's queued work, then unlock the pages. Later calls do nothing.

        Raises:
            PageLockError: CUDA cannot unlock them.
            RuntimeError: earlier work of the device failed; the pages are unlocked anyway.
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
            _clear_last_error(self._device)
            raise PageLockError(f"cannot unlock {memory.nbytes} bytes of host memory: {why}")

    def __del__(self) -> None:
        self.close()


def check_gpu(tier: str, device: torch.device) -> None:
    """Raise ValueError, which names the table tier, unless ``device`` is a GPU of this machine."""
    if device.type != "cuda":
        raise ValueError(f"table_tier: {tier} needs a GPU, not {device}")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= num_gpus:
        raise ValueError(f"table_tier: {tier} needs {device}, but torch finds {num_gpus} GPUs")


def _clear_last_error(device: torch.device) -> None:
    """Clear CUDA's last error, which torch would otherwise report for its next kernel.

    torch has no call that clears it, so this launches a kernel and ignores its error.
    """
    with suppress(RuntimeError):
        torch.ones(1, device=device)
