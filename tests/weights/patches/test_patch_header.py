"""Headers of patches: sizes are bounded before anything that depends on them is done."""

import json
import os
from dataclasses import dataclass

import pytest

from weights.errors import PatchError, PatchReadError
from weights.patches import patch_header
from weights.patches.opened_folder import OpenedFile
from weights.patches.patch_header import read_header

HUGE = 2**52


@dataclass(frozen=True)
class SparseFile(OpenedFile):
    """A file that claims a size which not every filesystem supports."""

    size: int

    @property
    def num_bytes(self) -> int:
        return self.size


@pytest.fixture
def opened(tmp_path):
    """Opens a file with a header, as one of a given size."""
    descriptors = []

    def open_header(entries, size=None):
        content = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
        (tmp_path / "file").write_bytes(len(content).to_bytes(8, "little") + content)
        descriptors.append(os.open(tmp_path / "file", os.O_RDONLY))
        return SparseFile(tmp_path / "file", descriptors[-1], 8 + len(content) + (size or 0))

    yield open_header
    for descriptor in descriptors:
        os.close(descriptor)


def entry(size, **changes):
    return {"dtype": "I64", "shape": [size // 8], "data_offsets": [0, size]} | changes


def test_a_huge_file_is_refused_by_its_size_or_checked_last(opened):
    with pytest.raises(PatchError, match="is truncated or not a safetensors file .*instead of"):
        read_header(opened({"a": entry(8)}, HUGE))
    # its sizes can be compared with limits, although no address space is as large
    header = read_header(opened({"a": entry(HUGE)}, HUGE))
    assert header.tensors["a"].shape == (HUGE // 8,)
    with pytest.raises(PatchReadError, match="file: cannot be checked"):
        header.check()


@pytest.mark.parametrize("problem", [MemoryError(), RuntimeError("mmap"), OSError(12, "mmap")])
def test_a_check_that_fails_for_lack_of_memory_is_reported(opened, monkeypatch, problem):
    def fail(file, framework):
        raise problem

    monkeypatch.setattr(patch_header, "safe_open", fail)
    with pytest.raises(PatchReadError, match="file: cannot be checked"):
        read_header(opened({"a": entry(8)}, 8)).check()


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ("[]", "not a JSON object"),
        ("[" * 10_000, "recursion"),
        ({"a\ud800": entry(8)}, r"the tensor name 'a\\ud800' is not printable"),
        ({"a\x1b[2J": entry(8)}, "is not printable"),
        ({"a": []}, "tensor a has no valid"),
        ({"a": entry(8, dtype="\x1b")}, "tensor a has no valid dtype"),
        ({"a": entry(8, shape=[1] * 9)}, "no valid dtype, shape"),
        ({"a": entry(8, shape=[True])}, "no valid dtype, shape"),
        ({"a": entry(8, data_offsets=[0, 8, 8])}, "no valid dtype, shape and data_offsets"),
        ({"a": entry(8, data_offsets=[0, -8])}, "no valid"),
        ({"a": entry(8, data_offsets=[0, 2**63])}, "no valid"),
        ({"a": {"dtype": "I64"}}, "no valid"),
    ],
)
def test_a_header_of_another_form_is_refused(opened, entries, named):
    with pytest.raises(PatchError, match=f"not a safetensors file .*{named}"):
        read_header(opened(entries, 8))


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry(8), "b": entry(16, data_offsets=[8, 16])},
        {"a": entry(8, data_offsets=[0, 4]), "b": entry(8, data_offsets=[8, 16])},
        {"a": entry(16, dtype="NONE")},
    ],
)
def test_tensors_that_do_not_fill_the_file_are_refused(opened, entries):
    header = read_header(opened(entries, 16))
    with pytest.raises(PatchError, match="not a safetensors file"):
        header.check()
