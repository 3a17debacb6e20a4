"""Page-locking, by a CUDA runtime that only writes down what it is told."""

from types import SimpleNamespace

import pytest
import torch

from memory_ops.anonymous import anonymous_zeros
from memory_ops.page_lock import PageLock, PageLockError

GPU = torch.device("cuda", 0)


class Runtime:
    """What of CUDA's runtime locks pages."""

    def __init__(self, status: int = 0) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.cudaError = SimpleNamespace(success=0)
        self._status = status

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.calls.append(("register", pointer, size))
        return self._status

    def cudaHostUnregister(self, pointer: int) -> int:
        self.calls.append(("unregister", pointer))
        return 0

    def cudaGetErrorString(self, status: int) -> str:
        return f"error {status}"


def use(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "cudart", lambda: runtime)
    patch.setattr(torch.cuda, "synchronize", lambda device: runtime.calls.append(("wait", device)))


def test_memory_is_locked_in_place_and_unlocked_once_nobody_reads_it(monkeypatch):
    runtime = Runtime()
    use(runtime, monkeypatch)
    table = anonymous_zeros((33, 100), torch.bfloat16)
    lock = PageLock(table, GPU)
    assert runtime.calls == [("register", table.data_ptr(), 6600)]
    lock.close()
    lock.close()
    assert runtime.calls[1:] == [("wait", GPU), ("unregister", table.data_ptr())]


def test_a_lock_that_is_forgotten_is_opened(monkeypatch):
    runtime = Runtime()
    use(runtime, monkeypatch)
    table = torch.zeros(4, 4)
    PageLock(table, GPU)
    assert runtime.calls[-1] == ("unregister", table.data_ptr())


def test_memory_that_cannot_be_locked_is_an_error(monkeypatch):
    runtime = Runtime(status=2)
    use(runtime, monkeypatch)
    with pytest.raises(PageLockError, match="64 bytes of host memory are not page-locked: error 2"):
        PageLock(torch.zeros(4, 4), GPU)
    assert [call[0] for call in runtime.calls] == ["register"]
