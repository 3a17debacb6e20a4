"""Hot rows of a model folder: read, carried by conversions, and the first rows of row caches."""

import pytest
import torch
from safetensors.torch import save_file

from memory_ops.native import disk_rows
from memory_ops.tables.disk import row_cache_bytes
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.config_json import read_config
from weights.checkpoints.convert import convert
from weights.checkpoints.hot_rows import HOT_ROWS_FILE, hot_rows_content, read_hot_rows
from weights.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    """A model with one table of 64 rows and a list of hot rows."""
    changes = feed_forward_changes("memory_plus", "dense", "memory_plus")
    made = save_model(random_model(tiny_config(**changes)), tmp_path / "model")
    content = hot_rows_content({"memory.table": torch.tensor([9, 63, 0, 20])})
    (made / HOT_ROWS_FILE).write_bytes(content)
    return made


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
def test_a_cache_begins_with_the_hot_rows(folder):
    rows, weights = torch.tensor([[[9, 63, 0, 20, 1]]]), torch.ones(1, 1, 5)
    loaded, _ = load_model(folder, table_cache=row_cache_bytes(40, 32 * 4, 64))
    table = loaded.tables["memory.table"]
    assert table.statistics() == {}
    table.start(rows, weights).finish()
    counted = table.statistics()[0]
    assert (counted.hits, counted.misses) == (4, 1)
    in_memory, _ = load_model(folder)
    assert in_memory.tables["memory.table"].tier == "device"


def test_conversions_carry_the_list(folder, tmp_path):
    convert(folder, tmp_path / "small", table_dtype="int8")
    rows = read_hot_rows(tmp_path / "small", read_config(folder).model)
    assert rows["memory.table"].tolist() == [9, 63, 0, 20]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.tensor([1])}, "tensor other: is no table of this model"),
        ({"memory.table": torch.tensor([1, 64])}, r"memory.table: row 64 is outside \[0, 64\)"),
        ({"memory.table": torch.tensor([-1])}, r"row -1 is outside \[0, 64\)"),
        ({"memory.table": torch.arange(65)}, r"at most 64 row ids in I64, got I64 \[65\]"),
        ({"memory.table": torch.tensor([1.0])}, r"at most 64 row ids in I64, got F32 \[1\]"),
        ({"memory.table": torch.zeros(2, 2).long()}, r"got I64 \[2, 2\]"),
    ],
)
def test_lists_of_another_model_are_refused(folder, tensors, message):
    save_file(tensors, folder / HOT_ROWS_FILE)
    model = read_config(folder).model
    with pytest.raises(CheckpointError, match=rf"{HOT_ROWS_FILE}: .*{message}"):
        read_hot_rows(folder, model)
    (folder / HOT_ROWS_FILE).write_text("text")
    with pytest.raises(CheckpointError, match=HOT_ROWS_FILE):
        read_hot_rows(folder, model)
    (folder / HOT_ROWS_FILE).unlink()
    assert read_hot_rows(folder, model) == {}
