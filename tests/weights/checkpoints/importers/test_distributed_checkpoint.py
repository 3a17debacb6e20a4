"""Folders of torch.distributed.checkpoint: what torch wrote is read, hostile ones are refused."""

import pickle
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import checkpoint

from tests.weights.checkpoints.importers.hostile import Hostile
from tests.weights.checkpoints.importers.sharded_files import write_shards
from weights.checkpoints.importers import distributed_checkpoint
from weights.checkpoints.importers.distributed_checkpoint import read_shards
from weights.errors import CheckpointError


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        read_shards(folder, "model.")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_list(folder, change):
    """Replace the list by what ``change`` makes of it."""
    listed = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(listed) or listed))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that no process group is there
def test_a_folder_that_torch_wrote(tmp_path):
    weights = {"a": torch.randn(5, 3), "b": torch.randn(7).bfloat16(), "c": torch.randn(()).half()}
    state = {"model": weights, "optim": {"step": torch.tensor(3), "lr": 0.1}}
    checkpoint.save(state, checkpoint_id=tmp_path / "run", no_dist=True)
    found = read_shards(tmp_path / "run", "model.")
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(found[name].whole(), tensor)


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 5),
    num_files=st.integers(1, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_shards_are_put_together(tmp_path_factory, rows, width, num_files, dtype):
    folder = tmp_path_factory.mktemp("run") / "step"
    tensors = {"model.t": torch.randn(rows, width).to(dtype), "optim.t": torch.randn(4)}
    write_shards(folder, tensors, num_files)
    found = read_shards(folder, "model.")
    assert list(found) == ["t"]
    assert torch.equal(found["t"].whole(), tensors["model.t"])
    assert torch.equal(torch.cat([*found["t"].parts()]), tensors["model.t"])


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "run", {"model.t": torch.randn(6, 4), "model.u": torch.ones(3)})


def test_tensors_are_compared_whatever_their_shards(tmp_path, folder):
    t = read_shards(folder, "model.")["t"]
    for num_files in (1, 2, 3, 4, 5):
        same = write_shards(tmp_path / f"same{num_files}", {"model.t": t.whole()}, num_files)
        assert read_shards(same, "model.")["t"].equals(t)
        other = write_shards(tmp_path / f"other{num_files}", {"model.t": t.whole() + 1}, num_files)
        assert not read_shards(other, "model.")["t"].equals(t)


def test_code_is_not_run(tmp_path, folder):
    change_list(folder, lambda listed: listed.state_dict_metadata.update(x=Hostile(tmp_path / "x")))
    assert "io.open is not known" in refusal(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "x")))
    assert "io.open is not known" in refusal(folder)
    assert not (tmp_path / "x").exists()


def test_code_in_a_shard_is_not_run(tmp_path, folder):
    def write(listed):
        info = next(iter(listed.storage_data.values()))
        with open(folder / info.relative_path, "wb") as file:
            torch.save({"t": Hostile(tmp_path / "x")}, file)
            info.offset, info.length = 0, file.tell()

    change_list(folder, write)
    assert "io.open is not known" in refusal(folder)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd", "a/b.distcp", "x.txt", 7])
def test_a_shard_lies_in_the_folder(folder, name):
    def change(listed):
        for info in listed.storage_data.values():
            info.relative_path = name

    change_list(folder, change)
    assert "the file of a shard is not the name of a .distcp file" in refusal(folder)


@pytest.mark.parametrize(("field", "value"), [("offset", -1), ("length", 2**60), ("length", "9")])
def test_places_of_shards_are_sizes(folder, field, value):
    change_list(
        folder, lambda listed: [setattr(i, field, value) for i in listed.storage_data.values()][:0]
    )
    assert "size" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offset", 3),
        ("offset", 10**9),
        ("length", 20),
        ("length", 0),
        ("relative_path", "n.distcp"),
    ],
)
def test_a_wrong_place_is_named(folder, field, value):
    change_list(
        folder, lambda listed: [setattr(i, field, value) for i in listed.storage_data.values()][:0]
    )
    assert ".distcp: " in refusal(folder)


def test_shards_that_overlap_or_lack_rows_are_refused(folder):
    def drop(listed):
        listed.state_dict_metadata["model.t"].chunks.pop()

    change_list(folder, drop)
    assert "'model.t': its shards do not cover it" in refusal(folder)

    def repeat(listed):
        chunks = listed.state_dict_metadata["model.t"].chunks
        chunks.append(chunks[0])

    change_list(folder, repeat)
    assert "'model.t': its shards do not follow each other" in refusal(folder)


def test_shards_along_other_dimensions_are_refused(folder):
    def change(listed):
        for chunk in listed.state_dict_metadata["model.t"].chunks:
            object.__setattr__(chunk, "sizes", torch.Size((3, 2)))

    change_list(folder, change)
    assert "'model.t': its shards do not follow each other" in refusal(folder)


def test_a_shape_that_lies_is_refused(folder):
    def change(listed):
        entry = listed.state_dict_metadata["model.t"]
        entry.size = torch.Size((6, 2**40))
        for chunk in entry.chunks:
            object.__setattr__(chunk, "sizes", torch.Size((3, 2**40)))

    change_list(folder, change)
    assert "a shard has shape [3, 4], not [3, 1099511627776]" in refusal(folder)


def test_a_compressed_shard_is_refused(folder):
    def change(listed):
        for info in listed.storage_data.values():
            with zipfile.ZipFile(folder / info.relative_path) as source:
                entries = {name: source.read(name) for name in source.namelist()}
            with zipfile.ZipFile(folder / "c.distcp", "w", zipfile.ZIP_DEFLATED) as target:
                for name, data in entries.items():
                    target.writestr(name, data)
            info.relative_path, info.offset = "c.distcp", 0
            info.length = (folder / "c.distcp").stat().st_size

    write_shards(folder.parent / "one", {"model.t": torch.zeros(64, 64)}, 1).rename(
        folder.parent / "two"
    )
    folder = folder.parent / "two"
    change_list(folder, change)
    assert "is compressed" in refusal(folder)


def test_sizes_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(distributed_checkpoint, "_MOST_METADATA_BYTES", 10)
    assert "more than 10" in refusal(folder)


@pytest.mark.parametrize("data", [b"", b"\x80\x05.", pickle.dumps(3), pickle.dumps({})])
def test_a_list_that_is_none_is_refused(folder, data):
    (folder / ".metadata").write_bytes(data)
    assert str(folder / ".metadata") in refusal(folder)
    (folder / ".metadata").unlink()
    assert "No such file" in refusal(folder)
