"""Tensors of a GGUF file that changes while it is read."""

import os

import gguf
import numpy as np
import pytest

from weights.checkpoints.importers.gguf_metadata import open_gguf
from weights.errors import CheckpointError

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def written(file):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("a", VALUES)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return file


@pytest.fixture
def opened(tmp_path):
    file = written(tmp_path / "m.gguf")
    (tensor,) = open_gguf(file).tensors
    return file, tensor.data


def test_data_are_read_on_each_use(opened):
    _, data = opened
    first = np.array(data)
    first[0] = 7.0
    assert np.array_equal(np.array(data), VALUES) and first.flags.writeable
    assert np.array(data, dtype=np.float64).dtype == np.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: os.truncate(file, 100), "m.gguf: ends within tensor a"),
        (lambda file: os.replace(written(file.with_name("new")), file), "tensor a: .* replaced"),
        (os.remove, "tensor a: No such file"),
    ],
    ids=["truncated", "replaced", "removed"],
)
def test_a_file_that_changes_is_refused(opened, change, message):
    file, data = opened
    change(file)
    with pytest.raises(CheckpointError, match=message):
        np.array(data)
