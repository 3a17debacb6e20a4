"""Files of torch.save: tensors are found in them; hostile files are refused in one line."""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from tests.weights.checkpoints.importers.hostile import Hostile
from weights.checkpoints.importers import saved_tensors
from weights.checkpoints.importers.record_pickle import Record
from weights.checkpoints.importers.saved_tensors import read_saved
from weights.checkpoints.tensor_files import StoredTensor, read_mapped
from weights.errors import CheckpointError


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        read_saved(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def rewritten(path, change, **options):
    """A copy of a file whose entries ``change`` may replace."""
    target = path.with_name("changed.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", **options) as copy:
        for name in source.namelist():
            copy.writestr(name, change(name, source.read(name)))
    return target


@pytest.fixture
def path(tmp_path):
    torch.save({"model": {"a": torch.arange(24.0).view(4, 6)}}, tmp_path / "file.pth")
    return tmp_path / "file.pth"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_found(tmp_path, dtype):
    large = torch.randn(300, 100).to(dtype)
    content = {
        "a": large,
        "again": large,
        "row": large[7],
        "scalar": torch.tensor(2.5, dtype=dtype),
        "none": torch.zeros(0, 3, dtype=dtype),
        "parameter": nn.Parameter(torch.ones(2, 2, dtype=dtype)),
        "one": torch.ones(3, 1, dtype=dtype),
    }
    torch.save(content, tmp_path / "file.pth")
    found = read_saved(tmp_path / "file.pth")
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        assert torch.equal(read_mapped(found[name]), tensor.detach())
    assert found["a"].offset == found["again"].offset


def test_state_dicts_and_other_values_are_read_as_data(tmp_path):
    content = OrderedDict(nn.Linear(2, 3).state_dict())
    content["steps"] = [1, 2.5, None, "x", True]
    for name, other in (("ids", torch.arange(3)), ("turned", torch.ones(2, 3).T)):
        content[name] = other
    torch.save(content, tmp_path / "file.pth")
    found = read_saved(tmp_path / "file.pth")
    assert found["steps"] == content["steps"]
    assert type(found["weight"]) is StoredTensor
    assert type(found["ids"]) is type(found["turned"]) is Record


def test_a_part_of_a_file_is_read(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.write(b"x" * 1000)
        torch.save(torch.arange(5.0), file)
        length = file.tell() - 1000
        file.write(b"y" * 70_000)
    found = read_saved(tmp_path / "file", 1000, length)
    assert torch.equal(read_mapped(found), torch.arange(5.0))


def test_code_is_not_run(tmp_path):
    torch.save({"model": Hostile(tmp_path / "made")}, tmp_path / "file.pth")
    assert refusal(tmp_path / "file.pth") == "cannot be read: io.open is not known"
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "made")))
    assert "is not a zip file" in refusal(tmp_path / "old.pth")
    assert not (tmp_path / "made").exists()


def test_damaged_and_missing_files_are_refused(path):
    whole = path.read_bytes()
    path.with_name("cut.pth").write_bytes(whole[: len(whole) // 2])
    assert "is not a zip file" in refusal(path.with_name("cut.pth"))
    assert "No such file" in refusal(path.with_name("missing.pth"))


def test_a_fifo_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.pth")
    assert "is not a regular file" in refusal(tmp_path / "fifo.pth")


def test_compressed_and_encrypted_entries_are_refused(path):
    bomb = rewritten(path, lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    assert "is compressed" in refusal(bomb)
    data = bytearray(path.read_bytes())
    for place in range(len(data)):
        if data[place : place + 4] == b"PK\1\2":  # an entry of the directory
            data[place + 8] |= 1
    path.write_bytes(data)
    assert "encrypted" in refusal(path)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (b"K\xffK\x06\x86", r"has 96 bytes"),
        (b"J\xff\xff\xff\xffK\x06\x86", "a size is not between"),
        (b"K\x04X\x01\x00\x00\x006\x86", "expected a tuple of sizes"),
    ],
)
def test_a_shape_that_lies_is_refused(path, shape, reason):
    lie = rewritten(path, lambda name, data: data.replace(b"K\x04K\x06\x86", shape))
    assert reason in refusal(lie)


def test_bytes_after_the_part_are_not_read(tmp_path, path):
    # the directory says that the tensor's bytes begin near the end of the file
    data = path.read_bytes()
    place = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)
    with zipfile.ZipFile(path) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("data/0"))
    old, new = struct.pack("<I", entry.header_offset), struct.pack("<I", len(data) - 40)
    directory = data[place:]
    assert old in directory
    path.write_bytes(data[:place] + directory.replace(old, new, 1))
    assert "has no header" in refusal(path)


def test_sizes_are_bounded(path, monkeypatch):
    large = rewritten(path, lambda name, data: data * 20 if "byteorder" in name else data)
    assert "byteorder has 120 bytes, more than 16" in refusal(large)
    big = rewritten(path, lambda name, data: b"big" if "byteorder" in name else data)
    assert "big-endian" in refusal(big)
    monkeypatch.setattr(saved_tensors, "_MOST_READ_BYTES", 100)
    assert "more than 100" in refusal(path)
