"""The identity of a model: kept by conversions of its tables, changed by any other weight."""

import hashlib
import shutil

import pytest
from safetensors.torch import load_file, save_file

from engine.model.config import ModelConfig
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints.convert import convert
from weights.checkpoints.tensor_files import list_tensors
from weights.errors import PatchError
from weights.patches.model_identity import check_patchable, model_identity


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_converted_tables_keep_the_identity(memory_plus_folder, tmp_path, dtype):
    identity = model_identity(memory_plus_folder)
    assert identity.shapes == {"memory.table": (64, 24)}
    convert(memory_plus_folder, tmp_path / "narrow", table_dtype=dtype)
    assert model_identity(tmp_path / "narrow") == identity


def test_other_dense_weights_choose_other_rows(memory_plus_folder, tmp_path):
    identity = model_identity(memory_plus_folder)
    convert(memory_plus_folder, tmp_path / "narrow", dtype="bfloat16")
    narrow = model_identity(tmp_path / "narrow")
    assert narrow.origins == identity.origins and narrow.row_choice != identity.row_choice


@pytest.mark.parametrize(
    "name", ["memory.subkeys", "memory.query.weight", "post_attention_layernorm.weight"]
)
def test_each_dense_weight_is_part_of_the_identity(memory_plus_folder, tmp_path, name):
    identity = model_identity(memory_plus_folder)
    folder = shutil.copytree(memory_plus_folder, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")
    assert model_identity(folder) == identity
    tensors[f"model.layers.3.{name}"].view(-1)[-1] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    changed = model_identity(folder)
    assert changed.origins == identity.origins and changed.row_choice != identity.row_choice


def test_the_hash_of_dense_weights_is_of_names_dtypes_shapes_and_bytes(memory_plus_folder):
    digest, file = hashlib.sha256(), memory_plus_folder / "model.safetensors"
    stored = list_tensors(memory_plus_folder)
    del stored["memory.table"]
    content = file.read_bytes()
    for name, one in sorted(stored.items()):
        digest.update(f"{name} F32 {list(one.shape)}\n".encode())
        digest.update(content[one.offset : one.offset + one.num_bytes])
    assert model_identity(memory_plus_folder).row_choice == digest.hexdigest()


def test_peer_is_refused_by_name(tmp_path):
    config = tiny_config(**feed_forward_changes("pkm", "peer"))
    folder = save_model(random_model(config), tmp_path / "model")
    with pytest.raises(PatchError, match=f"{folder}: layer 1 is peer, .* not linear in its rows"):
        model_identity(folder)


def test_a_model_without_memory_is_refused(tmp_path):
    config: ModelConfig = tiny_config()
    with pytest.raises(PatchError, match="has no memory layers, so it takes no row patches"):
        check_patchable(config, tmp_path)
