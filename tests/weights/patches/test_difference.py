"""Differences of folders: of one origin only, with every row whose values differ."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.weights.checkpoints.rewritten import rewrite_table
from tests.weights.patches.made import TABLE
from weights.checkpoints.convert import convert
from weights.checkpoints.table_files import read_rows
from weights.checkpoints.tensor_files import list_tensors
from weights.errors import PatchError
from weights.patches import table_rows
from weights.patches.difference import write_difference
from weights.patches.model_identity import model_identity
from weights.patches.patch_folder import read_patch


@pytest.fixture
def other(memory_plus_folder, tmp_path):
    """A copy of the tiny Memory+ model."""
    return shutil.copytree(memory_plus_folder, tmp_path / "other")


@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16", "int8"])
def test_a_difference_of_row_formats_is_that_of_their_values(
    memory_plus_folder, tmp_path, monkeypatch, table_dtype
):
    monkeypatch.setattr(table_rows, "_PART_VALUES", 24 * 7)
    convert(memory_plus_folder, tmp_path / "narrow", table_dtype=table_dtype)
    write_difference(memory_plus_folder, tmp_path / "narrow", tmp_path / "patch")
    first, second = (
        read_rows(list_tensors(folder)[TABLE]).float()
        for folder in (memory_plus_folder, tmp_path / "narrow")
    )
    patch = read_patch(tmp_path / "patch", model_identity(memory_plus_folder))
    rows_P, deltas_PV = patch.tables[TABLE]
    assert rows_P.tolist() == (first != second).any(dim=1).nonzero().squeeze(1).tolist()
    assert torch.equal(deltas_PV, (second - first)[rows_P])
    assert patch.description.settings == {"command": "diff"}


def test_folders_of_other_origins_are_refused_with_both_hashes(memory_plus_folder, other, tmp_path):
    rewrite_table(other, lambda rows: rows + 1, {"format": "pt"})
    first, second = (model_identity(one).origins[TABLE] for one in (memory_plus_folder, other))
    with pytest.raises(PatchError, match=f"origins: {memory_plus_folder} has .*{first}.*{second}"):
        write_difference(memory_plus_folder, other, tmp_path / "patch")


def test_folders_that_choose_other_rows_are_refused(memory_plus_folder, other, tmp_path):
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.memory.subkeys"] += 1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(PatchError, match="row_choice: .* has [0-9a-f]{64}, but .*/other has"):
        write_difference(memory_plus_folder, other, tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_a_difference_that_is_not_finite_is_refused_by_row(memory_plus_folder, other, tmp_path):
    def spoil(table_RV):
        table_RV[17, 3] = torch.nan
        return table_RV

    rewrite_table(other, spoil)
    with pytest.raises(PatchError, match="memory.table: row 17 has no finite difference"):
        write_difference(memory_plus_folder, other, tmp_path / "patch")
