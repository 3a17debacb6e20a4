"""Checkpoint folders: saved, loaded bit for bit, and refused by file and tensor when damaged."""

import gc
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.executors.executor import make_executor
from engine.model.config import MemoryConfig
from memory_ops.row_formats import ROW_FORMATS, quantize_rows
from tests.models import (
    feed_forward_changes,
    model_tensors,
    plain_logits,
    random_model,
    save_model,
    tiny_config,
)
from weights.checkpoints.checkpoint import load_model, open_checkpoint, save_checkpoint
from weights.checkpoints.config_json import CheckpointConfig
from weights.checkpoints.convert import convert
from weights.checkpoints.summary import describe, summarize
from weights.checkpoints.tensor_files import list_tensors, read_mapped
from weights.errors import CheckpointError

NORM = "model.norm.weight"
ROOT = Path(__file__).parents[3]


def memory_model(share_values: bool):
    memory = MemoryConfig(
        2, 8, 3, query_dim=8, value_dim=24, share_values=share_values, output_gate=True
    )
    return random_model(tiny_config(feed_forward=("memory_plus",) * 2, memory=memory))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(random_model(tiny_config()), tmp_path / "model")


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder's dense file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


OTHERS = tiny_config(**feed_forward_changes("moe", "peer", "dense", "peer"))


@pytest.mark.parametrize("share_values", [True, False])
def test_a_model_loads_as_it_was_saved(tmp_path, share_values):
    model = memory_model(share_values)
    folder = save_model(model, tmp_path / "model")
    loaded, config = load_model(folder)
    assert config.model == model.config
    found, expected = model_tensors(loaded), model_tensors(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    tables = sorted(path.name for path in folder.glob("table-*"))
    assert len(tables) == (1 if share_values else 2)


def test_experts_and_both_tables_of_peer_load_as_they_were_saved(tmp_path):
    model = random_model(OTHERS)
    loaded, config = load_model(save_model(model, tmp_path / "model"))
    assert config.model == OTHERS
    found, expected = model_tensors(loaded), model_tensors(model)
    assert found.keys() == expected.keys() and "memory.down_table" in found
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_quantised_tables_are_converted_loaded_and_kept(tmp_path, row_format):
    model = memory_model(False)
    source = save_model(model, tmp_path / "wide")
    convert(source, tmp_path / "narrow", "bfloat16", row_format)
    loaded, _ = load_model(tmp_path / "narrow")
    for layer in (0, 1):
        wanted = quantize_rows(model.model.layers[layer].memory.table.rows, row_format)
        rows = loaded.model.layers[layer].memory.table.rows
        assert (rows.row_format, rows.value_dim) == (row_format, 24)
        assert torch.equal(rows.records_RB, wanted.records_RB)
    ids = [1, 2, 3]
    wide = plain_logits(model.bfloat16(), ids).float()
    near = 0.5 if row_format in ("int4", "int4_row") else 0.1
    assert (plain_logits(loaded, ids).float() - wide).norm() < near * wide.norm()
    convert(tmp_path / "narrow", tmp_path / "again")
    for path in (tmp_path / "narrow").glob("table-*"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match=f"table_dtype: .* has {row_format} rows already"):
        convert(tmp_path / "narrow", tmp_path / "other", table_dtype="float32")
    summary = summarize(tmp_path / "narrow")
    assert (summary.table.parameters, summary.table.dtypes) == (2 * 64 * 24, (row_format,))


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({}, "has no valid row_format"),
        ({"row_format": "int3", "value_dim": "24"}, "has no valid row_format"),
        ({"row_format": "int8", "value_dim": "-1"}, "has no valid row_format"),
        ({"row_format": "int8", "value_dim": "99"}, "does not fit records of 99 int8"),
        ({"row_format": "int8", "value_dim": "9" * 5000}, "has no valid row_format"),
        ({"row_format": "int8", "value_dim": "25"}, "shape .64, 25., but .* requires .64, 24."),
    ],
)
def test_records_without_their_format_are_refused(tmp_path, metadata, named):
    source = save_model(memory_model(True), tmp_path / "wide")
    convert(source, tmp_path / "narrow", table_dtype="int8")
    (file,) = (tmp_path / "narrow").glob("table-*")
    save_file(load_file(file), file, metadata)
    with pytest.raises(CheckpointError, match=f"memory.table.*{named}"):
        open_checkpoint(tmp_path / "narrow")


def test_data_of_a_written_file_starts_on_a_page(tmp_path):
    folder = save_model(memory_model(True), tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        assert (int.from_bytes(file.read_bytes()[:8], "little") + 8) % 4096 == 0


def mapped_spans(folder: Path) -> list[tuple[int, int]]:
    """Address ranges at which this process maps files of the folder."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in maps if str(folder) in line]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


def test_large_weights_are_mapped_until_they_are_packed(tmp_path):
    # tensors of at least 64 KiB: embedding, head, queries, out, gate, up, down
    sizes = {"hidden_size": 512, "intermediate_size": 600, "vocab_size": 1000, "num_layers": 1}
    folder = save_model(random_model(tiny_config(**sizes)), tmp_path / "model")
    model, _ = load_model(folder)
    large = [one for one in model.parameters() if one.nbytes >= 2**16]
    assert len(large) == 7
    for tensor in large:
        assert any(start <= tensor.data_ptr() < end for start, end in mapped_spans(folder))
    assert len(mapped_spans(folder)) == 7
    del large, tensor
    executor = make_executor(model, EngineConfig(kv_cache_gib=0.001))
    del model
    gc.collect()
    # the embedding stays mapped for lookups
    assert len(mapped_spans(folder)) == 1
    del executor


def test_inspecting_a_model_does_not_import_torchs_compiler(folder):
    program = (
        "import sys; from pathlib import Path;"
        " from weights.checkpoints.checkpoint import load_model;"
        f"load_model(Path({str(folder)!r})); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2**19 + 3,)])
def test_a_tensor_anywhere_in_a_file(tmp_path, shape):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3, dtype=torch.uint8), "b": torch.randn(shape)}, file)
    stored = list_tensors(tmp_path)["b"]
    wanted = load_file(file)["b"]
    assert torch.equal(read_mapped(stored), wanted)
    read_mapped(stored).zero_()
    assert torch.equal(load_file(file)["b"], wanted)
    file.write_bytes(file.read_bytes()[: stored.offset + stored.num_bytes - 1])
    with pytest.raises(CheckpointError, match="tensor b"):
        read_mapped(stored)


def test_dtypes_by_default_and_by_choice(folder):
    assert load_model(folder)[0].model.norm.weight.dtype == torch.float32
    assert load_model(folder, "bfloat16")[0].model.norm.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype"):
        load_model(folder, "int3")


@pytest.mark.parametrize("keep_stored", [True, False])
def test_a_model_lies_on_its_device_in_the_serving_dtype(tmp_path, keep_stored):
    # meta tensors stand for those of a GPU
    device = torch.device("meta")
    folder = save_model(memory_model(False), tmp_path / "model")
    model, _ = load_model(folder, "float16", device=device, keep_stored=keep_stored)
    tensors = model_tensors(model) | {"rope": model.rope_frequencies}
    assert {tensor.device for tensor in tensors.values()} == {device}
    assert {one.dtype for one in model.parameters()} == {torch.float16}
    assert model.rope_frequencies.dtype is torch.float32
    assert [table.tier for table in model.tables.values()] == ["device"] * 2


def test_a_sharded_folder_is_read_through_its_index(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    loaded, _ = load_model(folder)
    torch.testing.assert_close(loaded.model.norm.weight.data, tensors[NORM])
    index.write_text(json.dumps({"weight_map": weight_map | {NORM: "../model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"\.\./model-1"):
        open_checkpoint(folder)
    for broken in ("{}", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": 3}', "{"):
        index.write_text(broken)
        with pytest.raises(CheckpointError, match="weight_map"):
            open_checkpoint(folder)


def remove(tensors):
    del tensors[NORM]


def add(tensors):
    tensors["model.layers.0.extra"] = torch.zeros(1)


def reshape(tensors):
    tensors[NORM] = tensors[NORM][:-1].clone()


def retype(tensors):
    tensors[NORM] = tensors[NORM].to(torch.int32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (remove, f"tensor {NORM} is missing"),
        (add, "tensor model.layers.0.extra is unknown"),
        (reshape, f"tensor {NORM} has shape"),
        (retype, f"tensor {NORM} has dtype I32"),
    ],
)
def test_a_damaged_tensor_is_named(folder, change, named):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=named):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated or not"):
        load_model(folder)


class Trap:
    """A class whose pickle creates a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_is_refused_and_never_loaded(folder, name):
    sprung = folder / "sprung"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(CheckpointError, match="pickle"):
        load_model(folder)
    assert not sprung.exists()


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_model(folder)


def test_a_tensor_in_two_files_is_refused(folder):
    shutil.copy(folder / "model.safetensors", folder / "table-0.safetensors")
    with pytest.raises(CheckpointError, match="is in model.safetensors too"):
        load_model(folder)


@pytest.mark.parametrize("place", ["model.", "model.layers.0.self_attn."])
@pytest.mark.parametrize("buffer", ["inv_freq", "original_inv_freq", "cos_cached", "sin_cached"])
def test_rotary_buffers_that_trainers_leave_are_ignored(folder, place, buffer):
    name = f"{place}rotary_emb.{buffer}"
    before, _ = load_model(folder)
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(4)}))
    after, _ = load_model(folder)
    assert torch.equal(after.rope_frequencies, before.rope_frequencies)
    assert plain_logits(after, [1, 2, 3]).equal(plain_logits(before, [1, 2, 3]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 4096}, r"tensor model\.layers\.2\.input_layernorm.* is missing"),
        ({"num_hidden_layers": 4097}, "num_hidden_layers: 4097 is more than 4096"),
        (
            {"model_type": "mixtral", "num_local_experts": 4096, "num_experts_per_tok": 2}
            | {"architectures": ["MixtralForCausalLM"]},
            "too few for 8192 experts of 2 layers",
        ),
    ],
)
def test_too_many_modules_are_refused_before_the_model_is_built(folder, change, named):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=named):
        load_model(folder)


def test_a_failed_save_leaves_no_files(tmp_path):
    model = random_model(tiny_config())
    with pytest.raises(CheckpointError, match="exists"):
        save_model(model, tmp_path)
    broken = CheckpointConfig(model.config)
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path / "new", broken, [None], {})
    assert list(tmp_path.iterdir()) == []


def test_convert_between_dtypes(tmp_path):
    source = save_model(memory_model(True), tmp_path / "wide")
    convert(source, tmp_path / "narrow", "bfloat16")
    narrow, config = load_model(tmp_path / "narrow")
    assert config.dtype == "bfloat16"
    wide = model_tensors(load_model(source)[0])
    for name, tensor in model_tensors(narrow).items():
        torch.testing.assert_close(tensor, wide[name].bfloat16(), rtol=0, atol=0)
    assert (tmp_path / "narrow" / "tokenizer.json").exists()


def test_convert_refuses_unknown_formats(tmp_path):
    file = tmp_path / "model.pth"
    file.touch()
    with pytest.raises(CheckpointError, match="neither"):
        convert(file, tmp_path / "out")
    with pytest.raises(ValueError, match="dtype"):
        convert(file, tmp_path / "out", "int3")
    tables = save_model(memory_model(True), tmp_path / "tables")
    with pytest.raises(ValueError, match="table_dtype: 'int3' is not one of"):
        convert(tables, tmp_path / "out", table_dtype="int3")
    plain = save_model(random_model(tiny_config()), tmp_path / "plain")
    with pytest.raises(ValueError, match="table_dtype: .*plain has no tables"):
        convert(plain, tmp_path / "out", table_dtype="int8")


def test_a_row_that_cannot_be_rounded_is_named(tmp_path):
    model = memory_model(True)
    model.model.layers[0].memory.table.rows[7, 3] = torch.nan
    source = save_model(model, tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"memory.table, rows from 0: .*row 7 has values"):
        convert(source, tmp_path / "narrow", table_dtype="int8")
    assert not (tmp_path / "narrow").exists()


def test_a_summary_counts_dense_table_and_active_parameters(tmp_path):
    model = memory_model(True)
    summary = summarize(save_model(model, tmp_path / "model"))
    dense = sum(parameter.numel() for parameter in model.parameters())
    assert (summary.dense.parameters, summary.table.parameters) == (dense, 64 * 24)
    assert summary.table.num_bytes == 4 * 64 * 24 and summary.dense.dtypes == ("F32",)
    assert summary.active == dense + 2 * 2 * 3 * 24
    text = describe(summary)
    others = random_model(OTHERS)
    found = summarize(save_model(others, tmp_path / "others"))
    dense_parameters = sum(parameter.numel() for parameter in others.parameters())
    idle = 3 * (3 * 32 * 24)
    assert found.active == dense_parameters - idle + 4 * 2 * 3 * 32
    assert "2 of 5 per token" in describe(found)
    assert "2 memory_plus" in text and f"{dense:,} parameters" in text and "64 rows x 24" in text
