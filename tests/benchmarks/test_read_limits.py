"""The read loops: every build reads all bytes, and failed reads of a file are errors."""

import numpy as np
import pytest
import torch

from benchmarks.read_limits import READ_LIBRARY, random_reads_per_s, read_library
from engine.errors import ConfigError
from memory_ops.native.disk_rows import RingError, RowFile
from memory_ops.native.library import NativeLibrary

ROW_BYTES = 200
each_build = pytest.mark.parametrize("build", READ_LIBRARY.runnable_builds)


def xor(memory):
    """Of all words, as the loops return it."""
    return int(np.bitwise_xor.reduce(memory.numpy().view(np.uint32), axis=None))


@each_build
def test_memory_is_read_from_first_to_last(build):
    memory = torch.randint(256, (64 * 1001,), dtype=torch.uint8)
    read = READ_LIBRARY.load(build).memplus_read_all
    assert read(memory.data_ptr(), memory.nbytes) == xor(memory)


@each_build
@pytest.mark.parametrize(
    ("group", "ahead", "cache"), [(1, 0, 1), (1, 4, 1), (1, 4, 2), (16, 16, 2), (100, 4, 1)]
)
def test_each_row_is_read_whole(build, group, ahead, cache):
    rows = torch.randint(256, (50, ROW_BYTES), dtype=torch.uint8)
    ids = torch.randint(50, (77,))
    read = READ_LIBRARY.load(build).memplus_read_rows
    arguments = rows.data_ptr(), ROW_BYTES, ids.data_ptr(), 77, group, ahead, cache
    assert read(*arguments) == xor(rows[ids])


@pytest.mark.skipif(not READ_LIBRARY.runnable_builds, reason="built without a compiler")
def test_rows_of_a_file_are_read_or_the_error_is_raised(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(bytes(50 * ROW_BYTES))
    with path.open("rb") as file:
        rows = RowFile(file.fileno(), 0, 50, ROW_BYTES, 1)
        try:
            assert random_reads_per_s(rows, 8, 100, 1) > 0
        except RingError:
            pytest.skip("the kernel allows no io_uring")
        with pytest.raises(OSError, match=r"Input/output error"):
            random_reads_per_s(rows._replace(offset=50 * ROW_BYTES), 8, 100, 1)


def test_without_a_compiler_nothing_is_measured(tmp_path, monkeypatch):
    none = NativeLibrary(tmp_path, {}, READ_LIBRARY.consequence)
    monkeypatch.setattr("benchmarks.read_limits.READ_LIBRARY", none)
    with pytest.raises(ConfigError, match="without its native library"):
        read_library()
