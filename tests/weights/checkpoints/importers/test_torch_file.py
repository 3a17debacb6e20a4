"""Files of torch.save: hostile ones are refused in one line, and nothing in them runs."""

import pickle
import zipfile

import pytest
import torch

from weights.checkpoints.importers import torch_file
from weights.checkpoints.importers.torch_file import read_torch_file
from weights.errors import CheckpointError


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_tensors_and_plain_values_are_read(tmp_path):
    shared = torch.randn(3, 4)
    content = {"model": {"a": shared, "b": shared}, "optim": {"steps": [1, 2.5, None, "x"]}}
    torch.save(content, tmp_path / "file.pth")
    found = read_torch_file(tmp_path / "file.pth")
    assert torch.equal(found["model"]["a"], shared)
    assert found["model"]["a"].data_ptr() == found["model"]["b"].data_ptr()
    assert found["optim"] == content["optim"]


def test_code_is_not_run(tmp_path):
    torch.save({"model": Hostile(tmp_path / "made")}, tmp_path / "file.pth")
    assert "holds more than tensors" in refusal(tmp_path / "file.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "made")))
    assert "is not a zip file" in refusal(tmp_path / "old.pth")
    assert not (tmp_path / "made").exists()


def test_a_compressed_file_is_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(2**16)}}, tmp_path / "file.pth")
    with (
        zipfile.ZipFile(tmp_path / "file.pth") as source,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    assert "is compressed" in refusal(tmp_path / "bomb.pth")


def test_the_size_of_the_pickle_and_the_number_of_entries_are_bounded(tmp_path, monkeypatch):
    torch.save({"model": {"a": torch.zeros(3)}}, tmp_path / "file.pth")
    monkeypatch.setattr(torch_file, "_MOST_PICKLE_BYTES", 10)
    assert "data.pkl has" in refusal(tmp_path / "file.pth")
    monkeypatch.setattr(torch_file, "_MOST_ENTRIES", 2)
    assert "more than 2" in refusal(tmp_path / "file.pth")


def test_damaged_files_are_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(2**12)}}, tmp_path / "file.pth")
    whole = (tmp_path / "file.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    assert "is not a zip file" in refusal(tmp_path / "cut.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    assert "is not a dictionary" in refusal(tmp_path / "list.pth")
    assert "No such file" in refusal(tmp_path / "missing.pth")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    torch.save({"model": {"a": torch.arange(24.0).view(4, 6)}}, tmp_path / "file.pth")
    with (
        zipfile.ZipFile(tmp_path / "file.pth") as source,
        zipfile.ZipFile(tmp_path / "lie.pth", "w") as lie,
    ):
        for name in source.namelist():
            data = source.read(name)
            # the shape (4, 6) in the pickle: K\x04K\x06\x86
            lie.writestr(name, data.replace(b"K\x04K\x06\x86", b"K\xffK\xff\x86"))
    refusal(tmp_path / "lie.pth")
