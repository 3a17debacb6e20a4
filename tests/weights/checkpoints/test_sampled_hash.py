"""Hashes of tensors by checksums and samples."""

import pytest
import torch
from safetensors.torch import save_file

from weights.checkpoints.sampled_hash import sampled_hash
from weights.checkpoints.tensor_files import list_file
from weights.errors import CheckpointError


def hash_of(path, metadata=None, **tensors):
    save_file(tensors, path, metadata)
    return sampled_hash(list_file(path))


@pytest.mark.parametrize("size", [1, 100, 50_000, 2_000_000])
@pytest.mark.parametrize("at", [0, -1])
def test_a_change_at_either_end_changes_the_hash(tmp_path, size, at):
    weight = torch.arange(float(size))
    first = hash_of(tmp_path / "first.safetensors", a=weight, b=weight + 1)
    assert hash_of(tmp_path / "again.safetensors", b=weight + 1, a=weight) == first
    changed = weight.clone()
    changed[at] += 1
    assert hash_of(tmp_path / "changed.safetensors", a=changed, b=weight + 1) != first


def test_all_of_a_small_tensor_counts(tmp_path):
    weight = torch.zeros(8 * 2**14, dtype=torch.uint8)
    hashes = set()
    for at in range(0, len(weight), 2**13):
        changed = weight.clone()
        changed[at] = 1
        hashes.add(hash_of(tmp_path / "one.safetensors", a=changed))
    assert len(hashes) == 16


def test_names_shapes_and_dtypes_count(tmp_path):
    values = torch.zeros(16, dtype=torch.int32)
    hashes = {
        hash_of(tmp_path / "one.safetensors", **{name: one})
        for name, one in (
            ("a", values),
            ("b", values),
            ("a", values.view(4, 4)),
            ("a", values.view(torch.float32)),
        )
    }
    assert len(hashes) == 4


def test_a_checksum_stands_for_the_content(tmp_path):
    rows = torch.zeros(2_000_000, dtype=torch.uint8)
    other = rows.clone()
    other[1_000_001] = 1
    sums = ({"sha256:a": "12"}, {"sha256:a": "13"})
    first = hash_of(tmp_path / "one.safetensors", sums[0], a=rows)
    assert hash_of(tmp_path / "one.safetensors", sums[0], a=other) == first
    assert hash_of(tmp_path / "one.safetensors", sums[1], a=rows) != first


def test_a_file_that_is_gone_is_named(tmp_path):
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    tensors = list_file(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"one\.safetensors: tensor a: No such file"):
        sampled_hash(tensors)
