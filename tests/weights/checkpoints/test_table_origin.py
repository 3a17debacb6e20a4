"""Origins of tables: written with new rows, and kept by every conversion."""

import pytest

from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from tests.weights.checkpoints.rewritten import rewrite_table
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.convert import convert
from weights.checkpoints.dtype_names import TABLE_DTYPES
from weights.checkpoints.table_origin import carried_metadata, new_origin, table_origin
from weights.checkpoints.tensor_files import StoredTensor, checksum_key, list_tensors
from weights.errors import CheckpointError

TABLE = "memory.table"


def table_of(folder) -> StoredTensor:
    return list_tensors(folder)[TABLE]


def test_a_new_table_gets_the_hash_of_its_content_as_origin(memory_plus_folder, tmp_path):
    table = table_of(memory_plus_folder)
    found = table.metadata["origin"]
    assert found == new_origin("F32", (64, 24), table.metadata[checksum_key(TABLE)])
    # the same rows without metadata
    convert(memory_plus_folder, tmp_path / "plain")
    rewrite_table(tmp_path / "plain", lambda rows: rows, {"format": "pt"})
    plain = table_of(tmp_path / "plain")
    assert plain.metadata == {"format": "pt"}
    assert table_origin(plain) == found == table_origin(table)
    # other rows, shapes and dtypes
    checksum = table.metadata[checksum_key(TABLE)]
    others = {new_origin("F32", (24, 64), checksum), new_origin("BF16", (64, 24), checksum)}
    assert len(others | {found, new_origin("F32", (64, 24), "0" * 64)}) == 4


def test_each_table_has_its_own_origin(tmp_path):
    model = random_model(tiny_config(**feed_forward_changes("pkm", "pkm", share_values=False)))
    _, stored = open_checkpoint(save_model(model, tmp_path / "model"))
    first, second = (stored[name] for name in model.config.table_names)
    assert first.metadata["origin"] != second.metadata["origin"]


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_conversions_keep_origin_and_patches(memory_plus_folder, tmp_path, dtype):
    convert(memory_plus_folder, tmp_path / "narrow", table_dtype=dtype)
    wanted = table_origin(table_of(memory_plus_folder))
    narrow = table_of(tmp_path / "narrow")
    assert table_origin(narrow) == wanted
    assert carried_metadata(narrow) == {"origin": wanted}
    metadata = {**narrow.metadata, "patches": "some hashes"}
    rewrite_table(tmp_path / "narrow", lambda rows: rows, metadata)
    convert(tmp_path / "narrow", tmp_path / "again")
    again = table_of(tmp_path / "again")
    assert carried_metadata(again) == {"origin": wanted, "patches": "some hashes"}


def test_changed_rows_have_another_origin_unless_the_file_names_one(memory_plus_folder, tmp_path):
    origin = table_origin(table_of(memory_plus_folder))
    convert(memory_plus_folder, tmp_path / "other")
    rewrite_table(tmp_path / "other", lambda rows: rows + 1)
    assert table_origin(table_of(tmp_path / "other")) == origin
    rewrite_table(tmp_path / "other", lambda rows: rows, {"format": "pt"})
    assert table_origin(table_of(tmp_path / "other")) != origin


def test_an_origin_that_is_not_a_hash_is_refused(memory_plus_folder, tmp_path):
    convert(memory_plus_folder, tmp_path / "other")
    rewrite_table(tmp_path / "other", lambda rows: rows, {"origin": "../x"})
    with pytest.raises(CheckpointError, match="table-00000.safetensors: origin: expected 64 hex"):
        table_origin(table_of(tmp_path / "other"))
