"""Anonymous memory: zeros, on small pages too if the kernel has no huge ones."""

import errno
import mmap

import pytest
import torch

from memory_ops import anonymous


@pytest.fixture
def log(caplog):
    """The log, of a process that has not said yet that it uses small pages."""
    anonymous._log_small_pages.cache_clear()
    yield caplog
    anonymous._log_small_pages.cache_clear()


def test_a_kernel_without_huge_pages_gives_small_ones_and_one_log_line(log, monkeypatch):
    class SmallPages(mmap.mmap):
        def madvise(self, option):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(anonymous.mmap, "mmap", SmallPages)
    for _ in range(3):
        memory = anonymous.anonymous_zeros((100, 7), torch.float32)
        assert memory.shape == (100, 7) and not memory.any()
        memory += 1
    assert log.messages == [
        "no transparent huge pages (Invalid argument): random reads of tables are slower"
    ]


def test_a_kernel_with_huge_pages_gives_them_without_a_word(log, monkeypatch):
    class HugePages(mmap.mmap):
        def madvise(self, option):
            assert option == mmap.MADV_HUGEPAGE

    monkeypatch.setattr(anonymous.mmap, "mmap", HugePages)
    assert not anonymous.anonymous_zeros((3,), torch.int64).any()
    assert log.messages == []
