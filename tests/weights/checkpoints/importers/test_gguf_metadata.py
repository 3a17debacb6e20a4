"""GGUF files whose headers lie are refused in one line, with nothing allocated."""

import math
import os
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.weights.checkpoints.importers.test_gguf import wide_model, with_merges, write_gguf
from tests.weights.checkpoints.refusals import refusal
from weights.checkpoints.convert import convert
from weights.checkpoints.importers.gguf import read_gguf
from weights.checkpoints.importers.gguf_metadata import open_gguf, value
from weights.errors import CheckpointError

MIB = 2**20
F32, F16, Q8_0 = 0, 1, 8
ALIGNMENT = 32


def text(content):
    content = content if isinstance(content, bytes) else content.encode()
    return struct.pack("<Q", len(content)) + content


def tensor(name, shape, kind=F32, offset=0):
    dims = b"".join(struct.pack("<Q", size) for size in shape)
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def write(file, *tensors, size=64, keys=(), count=None):
    """A GGUF file of these tensors, with ``size`` bytes of data after its padded header."""
    counts = struct.pack("<IQQ", 3, len(tensors) if count is None else count, len(keys))
    header = b"".join((b"GGUF", counts, *keys, *tensors))
    file.write_bytes(header + bytes(-len(header) % ALIGNMENT))
    os.truncate(file, file.stat().st_size + size)
    return file


def alignment(value, kind=4):
    return text("general.alignment") + struct.pack("<I", kind) + value


@pytest.fixture
def file(tmp_path):
    return tmp_path / "m.gguf"


def test_a_written_file_is_opened(file):
    write(file, tensor("a", [2, 3]), tensor("b", [32, 1], Q8_0, 32), size=66)
    first, second = open_gguf(file).tensors
    assert (first.name, first.data.shape, second.name, second.data.shape) == (
        *("a", (3, 2)),
        *("b", (1, 34)),
    )


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ([2**33, 2**33], F32),
        ([2**32, 2**32], F32),
        ([2**63, 2], F32),
        ([2**63, 2], F16),
        ([2**64 - 1], F32),
        ([2**64 - 2, 3], F32),
        ([2**62], F32),
        ([2**62, 4, 4], Q8_0),
        ([2**40], F32),
        ([2**59, 32], Q8_0),
        ([31], Q8_0),
        ([1] * 5, F32),
        ([1] * 1000, F32),
        ([], F32),
        ([], Q8_0),
        ([17], F32),
        ([1], 3),
        ([1], 2**31),
    ],
    ids=lambda found: str(found)[:30],
)
def test_sizes_that_lie_are_refused(file, shape, kind):
    write(file, tensor("a", shape, kind))
    tracemalloc.start()
    assert "m.gguf: is truncated or not a GGUF file" in refusal(open_gguf, file)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


@pytest.mark.parametrize("offset", [1, 16, 32, 64, 2**32, 2**63, 2**64 - 1, 2**64 - 64])
def test_a_first_tensor_that_does_not_begin_the_data_is_refused(file, offset):
    write(file, tensor("a", [2], offset=offset), size=128)
    assert "m.gguf: is truncated or not a GGUF file" in refusal(open_gguf, file)


@pytest.mark.parametrize("offset", [0, 8, 31, 33, 64, 2**64 - 32])
def test_tensors_that_overlap_or_leave_gaps_are_refused(file, offset):
    write(file, tensor("a", [8]), tensor("b", [8], offset=offset), size=128)
    assert "tensor b" in refusal(open_gguf, file)


@pytest.mark.parametrize(
    "key",
    [
        alignment(struct.pack("<I", 0)),
        alignment(struct.pack("<I", 3)),
        alignment(struct.pack("<I", 2**31)),
        alignment(struct.pack("<Q", 32), 10),
        alignment(text("32"), 8),
        alignment(struct.pack("<IQ", 4, 0), 9),
        alignment(b"", 99),
        text("a") + struct.pack("<IIQ", 9, 9, 2**40),
        text(b"\xff\xfe") + struct.pack("<IB", 0, 1),
    ],
)
def test_metadata_that_lie_are_refused(file, key):
    write(file, tensor("a", [2]), keys=[key])
    assert "m.gguf: is truncated or not a GGUF file" in refusal(open_gguf, file)


@pytest.mark.parametrize("name", ["a\nmemplus: all is well", "\x1b[2J", "x" * 2000, b"\xff"])
def test_names_cannot_break_the_line_of_an_error(file, name):
    write(file, tensor(name, [2]), tensor(name, [2], offset=32))
    assert "m.gguf: " in refusal(open_gguf, file)
    write(file, keys=[text(name) + struct.pack("<IB", 0, 1)] * 2)
    assert "m.gguf: " in refusal(open_gguf, file)
    write(file, tensor(name, [2]))
    assert "m.gguf: " in refusal(read_gguf, file, None)


@pytest.mark.parametrize("count", [3, 2**32, 2**63, 2**64 - 1])
def test_a_count_that_lies_is_refused(file, count):
    write(file, tensor("a", [2]), tensor("b", [2], offset=32), count=count)
    assert "m.gguf: is truncated or not a GGUF file" in refusal(open_gguf, file)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(file, tmp_path):
    os.mkfifo(file)
    for read in (open_gguf, lambda path: convert(path, tmp_path / "out")):
        assert "m.gguf: is not a regular file" in refusal(read, file)
    file.unlink()
    file.mkdir()
    assert "m.gguf: is not a regular file" in refusal(open_gguf, file)
    file.rmdir()
    assert "m.gguf: No such file" in refusal(open_gguf, file)
    file.touch()
    assert "m.gguf: is truncated or not a GGUF file" in refusal(open_gguf, file)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A model's file, its content, and the bytes of its header."""
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(file, wide_model(num_layers=1), gguf.GGMLQuantizationType.Q8_0, changes=with_merges)
    return file, file.read_bytes(), gguf.GGUFReader(file).data_offset


def stored(file):
    """Names, shapes, kinds and bytes of all tensors."""
    return [
        (one.name, tuple(one.shape), one.tensor_type, np.asarray(one.data).tobytes())
        for one in open_gguf(file).tensors
    ]


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_is_cut_anywhere_is_refused(model_file, share):
    file, content, _ = model_file
    # the padding of the last tensor may be missing
    file.write_bytes(content[: math.floor((len(content) - ALIGNMENT) * share)])
    assert "m.gguf: is truncated or not a GGUF file" in refusal(open_gguf, file)


@given(data=st.data())
def test_a_changed_header_is_refused_or_gives_the_same_bytes(model_file, data):
    file, content, length = model_file
    file.write_bytes(content)
    before = stored(file)
    changed = bytearray(content)
    # tensors are listed at the end of the header, behind the vocabulary
    where = st.one_of(st.integers(0, 600), st.integers(length - 900, length - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(where)] = data.draw(st.sampled_from([0, 1, 2, 8, 9, 32, 64, 127, 255]))
    file.write_bytes(changed)
    try:
        found = stored(file)
        imported = read_gguf(file, None)
        for key in open_gguf(file).fields:
            value(open_gguf(file), key)
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        assert [one[3] for one in found] == [one[3] for one in before]
        assert imported.sources
