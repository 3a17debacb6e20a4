"""GGUF files are converted once for each version, and unused old conversions are removed."""

import os
from pathlib import Path

import gguf
import pytest

from engine.model.grouped_layers import group_formats
from tests.weights.checkpoints.importers.test_gguf import wide_model, with_merges, write_gguf
from weights.checkpoints import convert as conversion
from weights.checkpoints.checkpoint import load_model
from weights.errors import CheckpointError
from weights.models import prepare as preparation
from weights.models.folder_lock import hold, remove_unheld
from weights.models.named_models import SMOLLM2, find_model, smollm2_source
from weights.models.prepare import prepare, prepared_folder


def write(path: Path, kind: str) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    write_gguf(path, wide_model(tie_embeddings=True), quantisation, changes=with_merges)


def bits(folder: Path) -> set[int]:
    model, _ = load_model(folder, keep_stored=True)
    return {one.bits for one in group_formats(model).values()}


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "m[1].v1.gguf"
    write(file, "Q8_0")
    return file


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def held(monkeypatch) -> list[int]:
    """The descriptors of held folders; to close them is what the end of a process does."""
    descriptors: list[int] = []

    def recorded(folder: Path) -> int | None:
        descriptor = hold(folder)
        if descriptor is not None:
            descriptors.append(descriptor)
        return descriptor

    monkeypatch.setattr(preparation, "hold", recorded)
    return descriptors


def end_processes(held: list[int]) -> None:
    while held:
        os.close(held.pop())


def conversions(cache: Path) -> set[str]:
    return {one.name for one in (cache / "models").iterdir() if one.is_dir()}


def test_a_file_is_converted_once_and_again_after_a_change(path, cache, monkeypatch):
    folder = prepared_folder(str(path), cache)
    assert folder == find_model(str(path), cache).folder and bits(folder) == {8}
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "convert", None)
        assert prepared_folder(str(path), cache) == folder
    write(path, "Q4_0")
    changed = prepared_folder(str(path), cache)
    assert changed != folder and bits(changed) == {4}
    path.write_bytes(b"GGUF, they said")
    with pytest.raises(CheckpointError, match="is truncated or not a GGUF file"):
        prepared_folder(str(path), cache)


def test_a_new_version_replaces_older_ones_that_no_process_holds(path, cache, held):
    first = prepared_folder(str(path), cache)
    write(path, "Q4_0")
    second = prepared_folder(str(path), cache)
    # as if another process served the first version
    assert conversions(cache) == {first.name, second.name} and bits(first) == {8}
    end_processes(held)
    write(path, "Q8_0")
    third = prepared_folder(str(path), cache)
    assert conversions(cache) == {third.name}


def test_conversions_of_other_files_stay(path, cache, held):
    others = [path.with_name("m[1].v2.gguf"), path.parent / "other" / path.name]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        write(other, "Q8_0")
    kept = {prepared_folder(str(other), cache).name for other in others}
    prepared_folder(str(path), cache)
    end_processes(held)
    write(path, "Q4_0")
    made = prepared_folder(str(path), cache)
    assert conversions(cache) == kept | {made.name}


def test_remains_of_killed_conversions_of_the_same_file_are_removed(path, cache):
    model = find_model(str(path), cache)
    left = [model.folder.with_name(f".{name}.partial-12") for name in (model.folder.name, "a-b")]
    older = model.folder.with_name(f".{model.family}-1.00.partial-12")
    for folder in (*left, older):
        folder.mkdir(parents=True)
    prepare(model)
    assert [folder.exists() for folder in (*left, older)] == [False, True, False]


def test_a_file_that_changes_before_its_conversion_is_refused(path, cache):
    model = find_model(str(path), cache)
    write(path, "Q4_0")
    with pytest.raises(CheckpointError, match="changed while it was converted; try again"):
        prepare(model)
    assert not conversions(cache)


def test_a_file_that_changes_during_its_conversion_is_refused(path, tmp_path, monkeypatch):
    check_shapes = conversion._check_shapes

    def change(*arguments):
        check_shapes(*arguments)
        write(tmp_path / "new.gguf", "Q4_0")
        (tmp_path / "new.gguf").rename(path)

    monkeypatch.setattr(conversion, "_check_shapes", change)
    with pytest.raises(CheckpointError, match="the file was replaced while it was read"):
        conversion.convert(path, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_converted_model_needs_its_file_no_more(path, cache):
    model = find_model(str(path), cache)
    prepare(model)
    path.unlink()
    assert bits(prepare(model)) == {8}


def test_files_that_cannot_be_read_are_refused_by_name(path, cache, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match=r"v1\.gguf: cannot be read \(Permission denied\)"):
        find_model(str(path), cache)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(CheckpointError, match=r"v1\.gguf: cannot be read \(Permission denied\)"):
        find_model(str(path), cache)


def test_long_names_of_files_make_short_names_of_folders(path, cache):
    path = path.rename(path.with_name("é" * 120 + ".gguf"))
    assert bits(prepared_folder(str(path), cache)) == {8}


def test_the_small_model_is_found_without_its_package_once_it_is_converted(cache, monkeypatch):
    assert find_model(SMOLLM2, cache).source == smollm2_source()
    folder = find_model(SMOLLM2, cache).folder
    folder.mkdir(parents=True)
    monkeypatch.setattr("weights.models.named_models.smollm2_source", None)
    assert prepare(find_model(SMOLLM2, cache)) == folder


def test_a_held_folder_is_not_removed(tmp_path):
    folder = tmp_path / "made"
    assert hold(folder) is None
    (folder / "inner").mkdir(parents=True)
    descriptor = hold(folder)
    assert descriptor is not None
    remove_unheld(folder)
    assert folder.exists()
    os.close(descriptor)
    remove_unheld(folder)
    assert not list(tmp_path.iterdir()) and hold(folder) is None


def test_a_folder_that_is_replaced_while_its_lock_is_awaited_is_not_held(tmp_path, monkeypatch):
    folder = tmp_path / "made"
    folder.mkdir()

    def lock(descriptor, kind):
        folder.rename(tmp_path / "gone")

    monkeypatch.setattr("weights.models.folder_lock.fcntl.flock", lock)
    assert hold(folder) is None
