"""Anonymous memory: zeros on huge pages, or on small pages if the kernel has no huge ones."""

import errno
import mmap
import re
from pathlib import Path

import pytest
import torch

from memory_ops import anonymous
from memory_ops.anonymous import anonymous_zeros, unpooled_zeros


@pytest.fixture
def log(caplog):
    """The log of a process that has not logged yet that it uses small pages."""
    anonymous._log_small_pages.cache_clear()
    yield caplog
    anonymous._log_small_pages.cache_clear()


def test_a_kernel_without_huge_pages_gives_small_ones_and_one_log_line(log, monkeypatch):
    class SmallPages(mmap.mmap):
        def madvise(self, option):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(anonymous.mmap, "mmap", SmallPages)
    for _ in range(3):
        memory = anonymous_zeros((100, 7), torch.float32)
        assert memory.shape == (100, 7) and not memory.any()
        memory += 1
    assert log.messages == [
        "no transparent huge pages (Invalid argument): random reads of tables are slower"
    ]


def test_a_kernel_with_huge_pages_gives_them_and_logs_nothing(log, monkeypatch):
    class HugePages(mmap.mmap):
        def madvise(self, option):
            assert option == mmap.MADV_HUGEPAGE

    monkeypatch.setattr(anonymous.mmap, "mmap", HugePages)
    assert not anonymous_zeros((3,), torch.int64).any()
    assert log.messages == []


@pytest.mark.parametrize("make", [anonymous_zeros, unpooled_zeros])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anonymous_memory_is_zero_and_writable(make, dtype):
    table = make((33, 7), dtype)
    assert table.shape == (33, 7) and table.dtype == dtype and not table.any()
    table.fill_(2)
    assert table.sum().item() == 33 * 7 * 2


def test_unpooled_memory_may_be_empty_and_asks_for_no_huge_pages(monkeypatch):
    class Mapping(mmap.mmap):
        madvise = pytest.fail

    monkeypatch.setattr(anonymous.mmap, "mmap", Mapping)
    assert unpooled_zeros((0, 7), torch.bfloat16).shape == (0, 7)
    assert not unpooled_zeros((3,), torch.int64).any()


def mapping_kb(tensor: torch.Tensor) -> dict[str, int]:
    """Memory statistics (kB, from smaps) of the mapping that holds a tensor."""
    sections = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M
    )
    for section in filter(None, sections):
        start, end = (int(part, 16) for part in section.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return {name: int(kb) for name, kb in re.findall(r"^(\w+): +(\d+) kB", section, re.M)}
    raise AssertionError("no mapping holds the tensor")


def test_anonymous_memory_is_allocated_on_write_in_huge_pages():
    tensor = anonymous_zeros((64, 2**20), torch.uint8)
    assert mapping_kb(tensor)["Rss"] < 4096
    tensor.fill_(1)
    taken = mapping_kb(tensor)
    assert taken["Rss"] >= 64 * 1024
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert taken["AnonHugePages"] > 0
