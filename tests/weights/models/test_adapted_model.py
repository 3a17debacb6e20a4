"""Models with memory adapters: a folder in the cache, made once per version of their files."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.memory_adapters import IDS, grown_model
from tests.models import plain_logits
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.convert import convert
from weights.errors import CheckpointError, ModelNotFoundError
from weights.models.adapted_model import find_served, present_version
from weights.models.named_models import ModelFolder
from weights.models.prepare import prepare, prepared_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return grown_model(folder), folder


def folders(cache: Path) -> set[str]:
    return {one.name for one in (cache / "models").iterdir() if one.is_dir()}


def test_without_an_adapter_it_is_the_model(made, tmp_path):
    _, folder = made
    assert find_served(str(folder / "base"), None, tmp_path).folder == folder / "base"


def test_the_folder_is_made_once(made, tmp_path):
    grown, folder = made
    names = str(folder / "base"), tmp_path, str(folder / "adapter")
    found = prepared_folder(*names)
    made_at = found.stat().st_mtime_ns
    assert prepared_folder(*names) == found and found.stat().st_mtime_ns == made_at
    loaded, _ = load_model(found)
    assert torch.equal(plain_logits(loaded, IDS), plain_logits(grown, IDS))


@pytest.mark.parametrize("changed", ["base/model.safetensors", "adapter/model.safetensors"])
def test_changed_files_make_another_folder(made, tmp_path, changed):
    _, folder = made
    names = str(folder / "base"), str(folder / "adapter"), tmp_path
    first = find_served(*names)
    os.utime(folder / changed, ns=(1, folder.stat().st_mtime_ns + 10**9))
    second = find_served(*names)
    assert second.folder != first.folder and second.family == first.family
    assert prepare(second) == second.folder and folders(tmp_path) == {second.folder.name}


def test_a_converted_base_is_known_by_the_name_of_its_folder(made, tmp_path):
    _, folder = made
    file = tmp_path / "model.gguf"
    base = ModelFolder(folder / "base", source=file, version="abc")
    adapter = folder / "adapter"
    version = present_version(base, adapter)
    os.utime(folder / "base" / "config.json", ns=(1, 1))
    assert present_version(base, adapter) == version
    assert present_version(replace(base, folder=tmp_path / "other"), adapter) != version


def test_files_that_changed_since_they_were_found_are_not_served(made, tmp_path):
    _, folder = made
    found = find_served(str(folder / "base"), str(folder / "adapter"), tmp_path)
    prepare(found)
    time = (folder / "adapter" / "table-00000.safetensors").stat().st_mtime_ns
    os.utime(folder / "adapter" / "table-00000.safetensors", ns=(1, time + 10**9))
    with pytest.raises(CheckpointError, match="adapter: it or its base changed since"):
        prepare(found)


def test_a_folder_without_a_description_is_refused(made, tmp_path):
    _, folder = made
    for wrong in (str(folder / "grown"), str(tmp_path / "missing")):
        with pytest.raises(ModelNotFoundError, match=r"^memory_adapter: .* has no memory_adapter"):
            find_served(str(folder / "base"), wrong, tmp_path)
    for wrong in ("x" * 300, "~nobody-of-this-name/x"):
        with pytest.raises(ModelNotFoundError, match=r"^memory_adapter: "):
            find_served(str(folder / "base"), wrong, tmp_path)
        with pytest.raises(CheckpointError):
            find_served(wrong, None, tmp_path)


def test_an_adapter_of_another_base_leaves_nothing(made, tmp_path):
    _, folder = made
    convert(folder / "base", tmp_path / "other", "bfloat16")
    with pytest.raises(CheckpointError, match="the adapter was made for the weights"):
        prepared_folder(str(tmp_path / "other"), tmp_path / "cache", str(folder / "adapter"))
    assert not folders(tmp_path / "cache")
