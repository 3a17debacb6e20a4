"""Patches written into tables: only their rows change, by what the format can hold."""

import errno
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from memory_ops.row_formats import ROW_FORMATS, RowRecords, quantize_rows
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from tests.weights.checkpoints.rewritten import rewrite_table
from tests.weights.patches.made import (
    IDENTITY,
    NUM_ROWS,
    TABLE,
    exact_model,
    patch_of,
    saved_patch,
)
from weights.checkpoints import tensor_files
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.convert import convert
from weights.checkpoints.dtype_names import FLOAT_DTYPES, TABLE_DTYPES
from weights.checkpoints.table_files import read_rows, stored_layout
from weights.checkpoints.tensor_files import checksum_key, list_tensors, read_mapped
from weights.errors import CheckpointError, PatchError
from weights.patches.apply import apply_patch
from weights.patches.difference import write_difference
from weights.patches.model_identity import model_identity
from weights.patches.patch_folder import read_patch, write_patch


@pytest.fixture(scope="module")
def exact_folders(memory_plus_folder, tmp_path_factory) -> dict[str, Path]:
    """The tiny Memory+ model with a table of exact values, by floating dtype of the table."""
    parent = tmp_path_factory.mktemp("exact")
    folders = {dtype: parent / dtype for dtype in FLOAT_DTYPES}
    exact_model(memory_plus_folder, folders["float32"])
    for dtype in FLOAT_DTYPES[:2]:
        convert(folders["float32"], folders[dtype], table_dtype=dtype)
    return folders


def stored_rows(folder: Path) -> torch.Tensor:
    return read_mapped(list_tensors(folder)[TABLE])


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_only_the_rows_of_the_patch_change(memory_plus_folder, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(tensor_files, "PART_BYTES", 7 * 24 * 4)
    source, target = tmp_path / "source", tmp_path / "target"
    convert(memory_plus_folder, source, table_dtype=dtype)
    identity = model_identity(source)
    patch = saved_patch(tmp_path / "patch", model=identity, count=20)
    error = apply_patch(source, tmp_path / "patch", target)[TABLE]

    rows_P, deltas_PV = patch.tables[TABLE]
    table, before, after = list_tensors(source)[TABLE], stored_rows(source), stored_rows(target)
    others = torch.ones(NUM_ROWS, dtype=torch.bool).index_fill(0, rows_P, False)
    assert torch.equal(before[others].view(torch.uint8), after[others].view(torch.uint8))
    wanted_PV = read_rows(table)[rows_P].float() + deltas_PV
    if dtype in ROW_FORMATS:
        assert torch.equal(after[rows_P], quantize_rows(wanted_PV, dtype).records_RB)
    else:
        assert torch.equal(after[rows_P], wanted_PV.to(before.dtype))
    distance_PV = (wanted_PV - read_rows(list_tensors(target)[TABLE])[rows_P].float()).abs()
    assert error.largest == float(distance_PV.max()) and error.num_rows == 20
    assert error.mean == pytest.approx(float(distance_PV.double().mean()))
    assert (error.largest == 0) == (dtype == "float32")

    # the copy is a complete model of the same identity
    assert model_identity(target) == identity
    model, _ = load_model(target, verify_tables=True)
    rows = model.model.layers[1].memory.table.rows
    assert torch.equal(rows.records_RB if isinstance(rows, RowRecords) else rows, after)
    metadata = list_tensors(target)[TABLE].metadata
    assert metadata["patches"] == patch.content_hash
    assert stored_layout(list_tensors(target)[TABLE]) == stored_layout(table)
    assert os.path.samefile(source / "model.safetensors", target / "model.safetensors")
    assert {one.name for one in source.iterdir()} == {one.name for one in target.iterdir()}


@pytest.mark.slow
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, NUM_ROWS),
    table_dtype=st.sampled_from(FLOAT_DTYPES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_difference_after_applying_is_the_patch(exact_folders, seed, count, table_dtype, dtype):
    source = exact_folders[table_dtype]
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        patch = patch_of(model_identity(source), seed, count, dtype)
        write_patch(parent / "patch", patch)
        errors = apply_patch(source, parent / "patch", parent / "target")
        assert all(error.largest == 0 for error in errors.values())
        counts = write_difference(source, parent / "target", parent / "back")
        back = read_patch(parent / "back", model_identity(source))
    assert counts == {TABLE: count}
    for found, wanted in zip(back.tables[TABLE], patch.tables[TABLE], strict=True):
        assert torch.equal(found, wanted.to(found.dtype))


def test_patches_add_up_and_are_named_in_order(memory_plus_folder, tmp_path):
    identity, hashes, folder = model_identity(memory_plus_folder), [], memory_plus_folder
    for seed in range(2):
        patch = saved_patch(tmp_path / f"patch-{seed}", model=identity, seed=seed)
        hashes.append(patch.content_hash)
        target = tmp_path / f"model-{seed}"
        apply_patch(folder, tmp_path / f"patch-{seed}", target)
        folder = target
    assert list_tensors(folder)[TABLE].metadata["patches"] == " ".join(hashes)
    convert(folder, tmp_path / "again", table_dtype="int8")
    assert list_tensors(tmp_path / "again")[TABLE].metadata["patches"] == " ".join(hashes)


def test_a_missing_base_patch_and_a_second_application_are_warned_of(
    memory_plus_folder, tmp_path, caplog
):
    identity = model_identity(memory_plus_folder)
    first = saved_patch(tmp_path / "first", model=identity)
    base_patches = {TABLE: [first.content_hash]}
    saved_patch(tmp_path / "second", model=identity, seed=1, base_patches=base_patches)
    apply_patch(memory_plus_folder, tmp_path / "first", tmp_path / "model")
    apply_patch(tmp_path / "model", tmp_path / "second", tmp_path / "both")
    assert not caplog.messages
    apply_patch(memory_plus_folder, tmp_path / "second", tmp_path / "alone")
    apply_patch(tmp_path / "both", tmp_path / "first", tmp_path / "twice")
    lacks, has = caplog.messages
    assert f"lacks patches that the patch was made on: {first.content_hash}" in lacks
    assert f"table {TABLE} has this patch already" in has
    write_difference(tmp_path / "model", tmp_path / "both", tmp_path / "back")
    assert read_patch(tmp_path / "back").description.base_patches == base_patches


def test_files_are_copied_if_they_cannot_be_linked(memory_plus_folder, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    saved_patch(tmp_path / "patch", model=model_identity(memory_plus_folder))
    apply_patch(memory_plus_folder, tmp_path / "patch", tmp_path / "target")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        copied, source = tmp_path / "target" / name, memory_plus_folder / name
        assert copied.read_bytes() == source.read_bytes() and not copied.samefile(source)


def test_the_file_behind_a_symbolic_link_is_linked(memory_plus_folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in memory_plus_folder.iterdir():
        (source / file.name).symlink_to(file)
    saved_patch(tmp_path / "patch", model=model_identity(source))
    apply_patch(source, tmp_path / "patch", tmp_path / "target")
    assert not any(file.is_symlink() for file in (tmp_path / "target").iterdir())


def test_a_patch_of_another_model_is_refused(memory_plus_folder, tmp_path):
    saved_patch(tmp_path / "patch", model=IDENTITY)
    with pytest.raises(PatchError, match="patch.json: row_choice: the patch was made for b{64}"):
        apply_patch(memory_plus_folder, tmp_path / "patch", tmp_path / "target")
    with pytest.raises(PatchError, match="patch: exists already"):
        apply_patch(memory_plus_folder, tmp_path / "patch", tmp_path / "patch")


def test_a_target_that_cannot_be_created_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").touch()
    none, target = tmp_path / "none", tmp_path / "file" / "target"
    for write in (partial(apply_patch, none, none), partial(write_difference, none, none)):
        with pytest.raises(PatchError, match=f"{target}: cannot be created"):
            write(target)


def test_peer_is_refused(tmp_path):
    config = tiny_config(**feed_forward_changes("peer", "dense"))
    folder = save_model(random_model(config), tmp_path / "model")
    with pytest.raises(PatchError, match="layer 0 is peer"):
        apply_patch(folder, tmp_path / "patch", tmp_path / "target")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("value", [6e4, torch.nan])
def test_a_row_that_is_not_finite_is_named_and_leaves_no_files(
    exact_folders, tmp_path, dtype, value
):
    source = tmp_path / "source"
    convert(exact_folders["float32"], source, table_dtype=dtype)
    patch = patch_of(model_identity(source), count=NUM_ROWS)
    patch.tables[TABLE][1][5, 3] = 6e4

    def spoil(table):
        if dtype == "float16":
            table[5, 3] = value
        else:
            table.view(torch.float32)[5, 24 // 4] = value * 5e33
        return table

    kept = dict(list_tensors(source)[TABLE].metadata)
    del kept[checksum_key(TABLE)]
    rewrite_table(source, spoil, kept)
    write_patch(tmp_path / "patch", patch)
    named = f"tensor {TABLE}: row 5 plus its delta is NaN or infinite"
    file = next(source.glob("table-*"))
    with pytest.raises(PatchError, match=f"{file}: {named}"):
        apply_patch(source, tmp_path / "patch", tmp_path / "target")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["patch", "source"]


def test_damaged_rows_are_not_given_a_new_checksum(memory_plus_folder, tmp_path):
    source = shutil.copytree(memory_plus_folder, tmp_path / "source")
    saved_patch(tmp_path / "patch", model=model_identity(source))
    rewrite_table(source, lambda table_RV: table_RV + 1)
    with pytest.raises(CheckpointError, match="memory.table: the data do not match its checksum"):
        apply_patch(source, tmp_path / "patch", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_table_in_a_file_of_other_tensors_is_refused(memory_plus_folder, tmp_path):
    source = shutil.copytree(memory_plus_folder, tmp_path / "source")
    (table,) = source.glob("table-*")
    save_file(
        load_file(source / "model.safetensors") | load_file(table), source / "model.safetensors"
    )
    table.unlink()
    saved_patch(tmp_path / "patch", model=model_identity(source))
    with pytest.raises(
        PatchError, match=rf"as well as table {TABLE}; run `memplus convert {source}"
    ):
        apply_patch(source, tmp_path / "patch", tmp_path / "target")
