"""Page-locking, with a fake CUDA runtime that records its calls."""

from types import SimpleNamespace

import pytest
import torch

from memory_ops.anonymous import anonymous_zeros
from memory_ops.page_lock import PageLock, PageLockError

GPU = torch.device("cuda", 0)


class Runtime:
    """A fake of the CUDA runtime's page-locking functions.

    Attributes:
        calls: the recorded calls.
        last_error: status of the last failed call; the next kernel launch reports and clears it.
    """

    def __init__(self, status: int = 0, unlock_status: int = 0) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.cudaError = SimpleNamespace(success=0)
        self.last_error = 0
        self._status, self._unlock_status = status, unlock_status

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.calls.append(("register", pointer, size))
        self.last_error = self._status
        return self._status

    def cudaHostUnregister(self, pointer: int) -> int:
        self.calls.append(("unregister", pointer))
        self.last_error = self._unlock_status
        return self._unlock_status

    def cudaGetErrorString(self, status: int) -> str:
        return f"error {status}"

    def launch(self, *args: object, **options: object) -> None:
        last, self.last_error = self.last_error, 0
        if last:
            raise RuntimeError(f"CUDA error {last}")


def use(runtime: Runtime, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "cudart", lambda: runtime)
    patch.setattr(torch.cuda, "synchronize", lambda device: runtime.calls.append(("wait", device)))
    patch.setattr(torch, "ones", runtime.launch)


def test_memory_is_locked_in_place_and_unlocked_once(monkeypatch):
    runtime = Runtime()
    use(runtime, monkeypatch)
    table = anonymous_zeros((33, 100), torch.bfloat16)
    lock = PageLock(table, GPU)
    assert runtime.calls == [("register", table.data_ptr(), 6600)]
    lock.close()
    lock.close()
    assert runtime.calls[1:] == [("wait", GPU), ("unregister", table.data_ptr())]


def test_a_dropped_lock_unlocks_its_memory(monkeypatch):
    runtime = Runtime()
    use(runtime, monkeypatch)
    table = torch.zeros(4, 4)
    PageLock(table, GPU)
    assert runtime.calls[-1] == ("unregister", table.data_ptr())


def test_memory_that_cannot_be_locked_is_an_error(monkeypatch):
    runtime = Runtime(status=2)
    use(runtime, monkeypatch)
    with pytest.raises(PageLockError, match="cannot page-lock 64 bytes of host memory: error 2"):
        PageLock(torch.zeros(4, 4), GPU)
    assert [call[0] for call in runtime.calls] == ["register"]
    # the next kernel does not report this error
    assert not runtime.last_error


def test_memory_that_cannot_be_unlocked_is_an_error(monkeypatch):
    runtime = Runtime(unlock_status=3)
    use(runtime, monkeypatch)
    lock = PageLock(torch.zeros(4, 4), GPU)
    with pytest.raises(PageLockError, match="cannot unlock 64 bytes of host memory: error 3"):
        lock.close()
    assert not runtime.last_error


def test_memory_is_unlocked_after_a_device_failure(monkeypatch):
    runtime = Runtime()
    use(runtime, monkeypatch)

    def fail(device: torch.device) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    table = torch.zeros(4, 4)
    lock = PageLock(table, GPU)
    with pytest.raises(RuntimeError, match="the device is lost"):
        lock.close()
    assert runtime.calls[-1] == ("unregister", table.data_ptr())


def test_a_table_without_rows_locks_nothing(monkeypatch):
    runtime = Runtime()
    use(runtime, monkeypatch)
    PageLock(torch.zeros(0, 4), GPU).close()
    assert not runtime.calls
