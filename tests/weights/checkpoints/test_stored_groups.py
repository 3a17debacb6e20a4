"""Folders with weights in groups of 8 or 4 bits: written, read, kept, and refused if damaged."""

import json
import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.batch import prompt_batch
from engine.executors.cpu.kernels import CPU_LIBRARY
from engine.executors.executor import make_executor
from engine.model.grouped_layers import group_formats
from engine.model.grouped_weights import dense_weights, group_weights
from server.cli.main import main
from server.model_loading import load_served, served_executor
from server.model_options import ModelOptions
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints.checkpoint import expected_tensors, load_model, open_checkpoint
from weights.checkpoints.convert import convert
from weights.checkpoints.device_loading import DeviceLoader
from weights.checkpoints.model_bytes import model_bytes
from weights.checkpoints.model_weights import device_weights, mapped_weights, weight_bytes
from weights.checkpoints.packed_formats import packed_formats
from weights.checkpoints.stored_groups import stored_formats
from weights.checkpoints.summary import describe, summarize
from weights.errors import CheckpointError
from weights.patches.model_identity import model_identity
from weights.training.new_model import model_config, new_model

CPU, META = torch.device("cpu"), torch.device("meta")
DENSE = "model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj"
EXACT = (".gate.weight", ".output_gate.weight", "norm.weight", ".subkeys", ".bias")
each_dtype = pytest.mark.parametrize("dtype", ["int8", "int4"])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model with layers of every kind, 40 wide, and an untied head."""
    torch.manual_seed(4)
    kinds = ("dense", "moe", "memory_plus", "pkm", "peer")
    changes = feed_forward_changes(*kinds, value_dim=40, output_gate=True)
    model = random_model(tiny_config(hidden_size=40, tie_embeddings=False, **changes))
    return save_model(model, tmp_path_factory.mktemp("models") / "source")


@pytest.fixture(scope="module")
def folders(source) -> dict[str, Path]:
    made = {dtype: source.parent / dtype for dtype in ("int8", "int4")}
    for dtype, folder in made.items():
        assert main(["quantize", str(source), str(folder), "--weight-dtype", dtype]) == 0
    return made


def is_exact(name):
    return name.endswith(EXACT) and not name.endswith("memory.gate.weight")


def logits(model, **options):
    made = make_executor(model, EngineConfig(kv_cache_gib=0.001, block_size=16), **options)
    return made.logits(prompt_batch(range(20), 16))


@each_dtype
def test_layers_are_rounded_and_small_ones_are_kept(source, folders, dtype):
    before, after = load_file(source / DENSE), load_file(folders[dtype] / DENSE)
    for name, weight in before.items():
        if is_exact(name):
            assert torch.equal(after.pop(name), weight)
            continue
        bits = 8 if name in ("model.embed_tokens.weight", "lm_head.weight") else int(dtype[3:])
        groups = group_weights(weight, bits)
        assert torch.equal(after.pop(name), groups.values)
        assert torch.equal(after.pop(f"{name}_scales"), groups.scales_OG)
    assert not after


def test_embedding_and_head_take_another_dtype(source, tmp_path):
    convert(source, tmp_path / "small", weight_dtype="int8", embedding_dtype="int4")
    model, _ = load_model(tmp_path / "small", keep_stored=True)
    narrow = {name for name, one in group_formats(model).items() if one.bits == 4}
    assert narrow == {"model.embed_tokens", "lm_head"}


@each_dtype
def test_a_folder_gives_the_tokens_of_rounding_at_load(source, folders, dtype):
    wanted = logits(load_model(source)[0], weight_dtype=dtype)
    assert torch.equal(logits(load_model(folders[dtype], keep_stored=True)[0]), wanted)


@each_dtype
def test_the_server_rounds_at_load_or_reads_a_rounded_folder(source, folders, dtype):
    config, cpu = EngineConfig(kv_cache_gib=0.001), torch.device("cpu")

    def served(folder, **options):
        model = ModelOptions(str(folder), **options)
        made = served_executor(load_served(model, folder, config, cpu, keep_stored=True), config)
        return made.logits(prompt_batch(range(20), 16))

    assert torch.equal(served(folders[dtype]), served(source, weight_dtype=dtype))


@each_dtype
def test_a_tied_head_is_stored_once(tmp_path, dtype):
    folder = save_model(random_model(tiny_config(tie_embeddings=True)), tmp_path / "source")
    wanted = logits(load_model(folder)[0], weight_dtype=dtype)
    convert(folder, tmp_path / "made", weight_dtype=dtype)
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "made" / DENSE))
    assert torch.equal(logits(load_model(tmp_path / "made", keep_stored=True)[0]), wanted)


def test_a_head_beside_a_tied_embedding_in_groups_is_refused(tmp_path):
    folder = save_model(random_model(tiny_config(tie_embeddings=True)), tmp_path / "source")
    convert(folder, tmp_path / "made", weight_dtype="int8")
    tensors = load_file(tmp_path / "made" / DENSE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "made" / DENSE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load_model(tmp_path / "made")


@each_dtype
def test_weights_that_are_not_finite_are_not_rounded(tmp_path, dtype):
    model = random_model(tiny_config())
    model.layers[1].self_attn.k_proj.weight.data[3, 4] = torch.nan
    folder = save_model(model, tmp_path / "source")
    with pytest.raises(
        CheckpointError, match=r"k_proj\.weight has values that are NaN or infinite"
    ):
        convert(folder, tmp_path / "made", weight_dtype=dtype)
    assert not (tmp_path / "made").exists()


@each_dtype
@pytest.mark.parametrize("compute", ["auto", "bfloat16"])
def test_weights_are_dense_unless_they_are_kept(source, folders, dtype, compute):
    model, config = load_model(folders[dtype], compute)
    chosen = torch.float32 if compute == "auto" else torch.bfloat16
    assert config.has_groups and not group_formats(model)
    for name, weight in load_file(source / DENSE).items():
        found = model.state_dict()[name]
        assert found.dtype is chosen and found.shape == weight.shape
        if not is_exact(name):
            bits = 8 if name in ("model.embed_tokens.weight", "lm_head.weight") else int(dtype[3:])
            groups = group_weights(weight, bits)
            assert torch.equal(found, dense_weights(groups, weight.shape[1], chosen))


def dense_tensors(folder):
    config, stored = open_checkpoint(folder)
    return config.model, {n: one for n, one in stored.items() if n not in config.model.table_names}


def widths(config, stored):
    tensors = expected_tensors(config)
    return {name: tensors[f"{name}.weight"].shape[1] for name in stored_formats(stored)}


@each_dtype
def test_a_device_gets_dense_weights_and_one_layer_of_groups_at_a_time(folders, dtype, monkeypatch):
    config, stored = dense_tensors(folders[dtype])
    grouped: list[weakref.ref] = []
    load = DeviceLoader.load

    def watched(self, one, wanted, *arguments, **options):
        alive = {ref().storage_name for ref in grouped if ref() is not None}
        assert alive <= {one.name.rpartition(".")[0]}
        found = load(self, one, wanted, *arguments, **options)
        if one.name.rpartition(".")[0] in stored_formats(stored) and not one.name.endswith("bias"):
            found.storage_name = one.name.rpartition(".")[0]
            grouped.append(weakref.ref(found))
        return found

    monkeypatch.setattr(DeviceLoader, "load", watched)
    found = device_weights(stored, torch.bfloat16, CPU, widths(config, stored))
    wanted = load_model(folders[dtype], "bfloat16")[0].state_dict()
    assert len(grouped) == 2 * len(stored_formats(stored)) and found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype is torch.bfloat16 and torch.equal(found[name], weight)


@each_dtype
def test_a_device_keeps_groups_for_an_executor(folders, dtype):
    _, stored = dense_tensors(folders[dtype])
    formats = stored_formats(stored)
    found = device_weights(stored, torch.bfloat16, CPU, {})
    wanted = mapped_weights(stored)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        is_kept = name.rpartition(".")[0] in formats and not name.endswith("bias")
        assert torch.equal(found[name], weight if is_kept else weight.bfloat16())
    needed = weight_bytes(stored, torch.bfloat16, formats)
    assert sum(one.nbytes for one in found.values()) == needed
    # meta tensors stand for those of a GPU
    model, _ = load_model(folders[dtype], "bfloat16", device=META, keep_stored=True)
    assert group_formats(model) == formats
    assert not group_formats(load_model(folders[dtype], "bfloat16", device=META)[0])


def test_a_gpu_shares_a_tied_head_of_another_dtype(tmp_path):
    folder = save_model(random_model(tiny_config(tie_embeddings=True)), tmp_path / "model")
    on_cpu = model_bytes(folder, "bfloat16", "auto", packed_dtype="auto").weights
    on_gpu = model_bytes(folder, "bfloat16", "auto", packed_dtype="auto", device=META).weights
    config = tiny_config()
    assert on_cpu - on_gpu == 2 * config.vocab_size * config.hidden_size


@each_dtype
def test_wide_layers_are_made_dense_in_parts(dtype, monkeypatch):
    groups = group_weights(torch.randn(50, 70), int(dtype[3:]))
    whole = dense_weights(groups, 70, torch.bfloat16)
    monkeypatch.setattr("engine.model.grouped_weights._PART_WEIGHTS", 7 * 70)
    assert torch.equal(dense_weights(groups, 70, torch.bfloat16), whole)


@each_dtype
def test_bytes_of_weights_in_groups_are_those_in_the_file(folders, dtype):
    config, stored = dense_tensors(folders[dtype])
    needed = sum(
        2 * math.prod(one.shape) if is_exact(name) else one.num_bytes
        for name, one in stored.items()
    )
    assert weight_bytes(stored, torch.bfloat16, packed_formats(config, stored, "auto")) == needed
    assert model_bytes(folders[dtype], "bfloat16", "auto", packed_dtype="auto").weights == needed


@each_dtype
def test_bytes_of_weights_to_round_are_those_of_the_rounded_folder(source, folders, dtype):
    wanted = model_bytes(folders[dtype], "float32", "auto", packed_dtype="auto")
    assert model_bytes(source, "float32", "auto", packed_dtype=dtype).weights == wanted.weights


@each_dtype
def test_bytes_of_dense_weights_are_those_of_the_unrounded_folder(tmp_path, dtype):
    # all inputs are whole groups
    config = tiny_config(hidden_size=32, intermediate_size=64)
    folder = save_model(random_model(config), tmp_path / "source")
    convert(folder, tmp_path / "made", weight_dtype=dtype)
    _, stored = dense_tensors(tmp_path / "made")
    layers = {name.rpartition(".")[0] for name in stored if name.endswith("_scales")}
    largest = max(
        sum(stored[f"{layer}.{kind}"].num_bytes for kind in ("weight", "weight_scales"))
        for layer in layers
    )
    wanted = model_bytes(folder, "bfloat16", "auto").weights
    assert model_bytes(tmp_path / "made", "bfloat16", "auto").weights == wanted + largest


@each_dtype
def test_a_tied_embedding_that_is_rounded_at_load_is_counted_beside_the_head(tmp_path, dtype):
    tied, untied = (
        save_model(random_model(tiny_config(tie_embeddings=is_tied)), tmp_path / f"{is_tied}")
        for is_tied in (True, False)
    )

    def count(folder, dtype, packed_dtype):
        return model_bytes(folder, dtype, "auto", "auto", packed_dtype).weights

    assert count(tied, "auto", dtype) == count(untied, "auto", dtype)
    # so is one that is served in another dtype than that of the file
    assert count(tied, "bfloat16", "auto") == count(untied, "bfloat16", "auto")
    assert count(tied, "auto", "auto") < count(untied, "auto", "auto")


def test_layers_of_one_product_are_as_wide_as_the_widest(source, folders, tmp_path):
    folder = shutil.copytree(folders["int4"], tmp_path / "mixed")
    tensors, dense = load_file(folder / DENSE), load_file(source / DENSE)
    wide = "model.layers.0.self_attn.v_proj"
    groups = group_weights(dense[f"{wide}.weight"], 8)
    tensors[f"{wide}.weight"], tensors[f"{wide}.weight_scales"] = groups.values, groups.scales_OG
    del tensors["model.layers.0.mlp.up_proj.weight_scales"]
    tensors["model.layers.0.mlp.up_proj.weight"] = dense["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / DENSE)
    config, stored = dense_tensors(folder)
    formats = packed_formats(config, stored, "auto")
    layer = "model.layers.0."
    first = {
        name[len(layer) :]: one.bits for name, one in formats.items() if name.startswith(layer)
    }
    attention = {f"self_attn.{name}_proj": 8 for name in "qkv"}
    assert first == attention | {"self_attn.o_proj": 4, "mlp.down_proj": 4}
    assert formats.keys() < stored_formats(stored).keys()


@each_dtype
def test_the_server_reckons_with_the_bytes_of_packed_weights(source, folders, dtype, monkeypatch):
    asked = []
    monkeypatch.setattr("server.model_loading.model_bytes", lambda *a: asked.append(a[-2]) or 1 / 0)

    def packed(folder, keep_stored=True, device=CPU, **options):
        with pytest.raises(ZeroDivisionError):
            load_served(
                ModelOptions(str(folder), **options), folder, None, device, keep_stored=keep_stored
            )
        return asked.pop()

    assert packed(folders[dtype]) == "auto" and packed(source, weight_dtype=dtype) == dtype
    assert packed(folders[dtype], keep_stored=False) is None
    monkeypatch.setattr(CPU_LIBRARY, "best_build", None)
    assert packed(folders[dtype]) is None
    # a GPU needs no native library
    assert packed(folders[dtype], device=META) == "auto"


def test_rounding_without_the_native_library_is_refused_before_the_load(source, monkeypatch):
    monkeypatch.setattr(CPU_LIBRARY, "best_build", None)
    monkeypatch.setattr("server.model_loading.load_model", None)
    options = ModelOptions(str(source), weight_dtype="int8")
    with pytest.raises(ConfigError, match="weight_dtype: int8 needs memplus's native library"):
        load_served(options, source, None, CPU, keep_stored=True)


@each_dtype
def test_converting_keeps_the_bits_unless_a_dtype_is_given(folders, tmp_path, dtype):
    assert main(["convert", str(folders[dtype]), str(tmp_path / "again")]) == 0
    before, after = load_file(folders[dtype] / DENSE), load_file(tmp_path / "again" / DENSE)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert raw["torch_dtype"] == "float32"
    assert raw["quantization_config"] == {"quant_method": "memplus", "group_size": 32}


@each_dtype
def test_converting_to_a_dtype_makes_dense_weights(folders, tmp_path, dtype):
    arguments = ["convert", str(folders[dtype]), str(tmp_path / "dense"), "--dtype", "bfloat16"]
    assert main(arguments) == 0
    found, config = load_model(tmp_path / "dense", keep_stored=True)
    assert not config.has_groups and config.dtype == "bfloat16"
    wanted = load_model(folders[dtype], "bfloat16")[0].state_dict()
    assert found.state_dict().keys() == wanted.keys()
    assert all(torch.equal(found.state_dict()[name], weight) for name, weight in wanted.items())
    convert(tmp_path / "dense", tmp_path / "rounded", weight_dtype=dtype)


@pytest.mark.parametrize(
    ("wide", "narrow", "served"),
    [("norm", "rest", torch.bfloat16), ("rest", "norm", torch.float32)],
)
def test_rounding_keeps_the_serving_dtype_of_mixed_dtypes(tmp_path, wide, narrow, served):
    folder = save_model(random_model(tiny_config()), tmp_path / "source")
    tensors = load_file(folder / DENSE)
    for name, tensor in tensors.items():
        if ("norm" if "norm" in name else "rest") == narrow:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, folder / DENSE)
    convert(folder, tmp_path / "rounded", weight_dtype="int8")
    convert(tmp_path / "rounded", tmp_path / "copied")
    for one in ("source", "rounded", "copied"):
        assert model_bytes(tmp_path / one, "auto", "auto").dtype is served


def test_a_summary_counts_parameters_and_stored_bytes(source, folders):
    wide, narrow = summarize(source), summarize(folders["int4"])
    assert (narrow.dense.parameters, narrow.active) == (wide.dense.parameters, wide.active)
    assert narrow.dense.dtypes == ("F32", "int4", "int8")
    stored = load_file(folders["int4"] / DENSE)
    assert narrow.dense.num_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert "int4" in describe(narrow)


@each_dtype
def test_the_weights_are_not_rounded_twice(folders, tmp_path, capsys, dtype):
    arguments = ["quantize", str(folders[dtype]), str(tmp_path / "new"), "--weight-dtype", "int8"]
    assert main(arguments) == 2
    assert "--weight-dtype: the weights of" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match=f"weight_dtype: .* have {dtype[3:]} bits already"):
        logits(load_model(folders[dtype], keep_stored=True)[0], weight_dtype="int8")
    options = ModelOptions(str(folders[dtype]), weight_dtype="int8")
    for keep_stored in (True, False):
        with pytest.raises(ConfigError, match="weight_dtype: the weights of .* few bits already"):
            load_served(options, folders[dtype], None, torch.device("cpu"), keep_stored=keep_stored)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_dtype": "int4"}, "embedding_dtype: needs weight_dtype"),
        ({"weight_dtype": "int3"}, "weight_dtype: 'int3' is not one of int8, int4"),
        (
            {"weight_dtype": "int8", "embedding_dtype": "fp8"},
            "embedding_dtype: 'fp8' is not one of int8, int4",
        ),
    ],
)
def test_wrong_dtypes_are_refused(source, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / "made", **options)


def without_scales(tensors, config):
    del tensors[f"{QUERY}.weight_scales"]


def without_weight(tensors, config):
    del tensors[f"{QUERY}.weight"]


def with_wide_scales(tensors, config):
    tensors[f"{QUERY}.weight_scales"] = tensors[f"{QUERY}.weight_scales"].float()


def with_dense_weight(tensors, config):
    tensors[f"{QUERY}.weight"] = torch.randn(32, 40)


def with_short_groups(tensors, config):
    tensors[f"{QUERY}.weight"] = tensors[f"{QUERY}.weight"][:, :40].contiguous()


def with_a_grouped_norm(tensors, config):
    tensors["model.norm.weight"] = torch.ones(40, dtype=torch.int8)


def with_a_grouped_router(tensors, config):
    groups = group_weights(tensors["model.layers.1.block_sparse_moe.gate.weight"], 8)
    tensors["model.layers.1.block_sparse_moe.gate.weight"] = groups.values
    tensors["model.layers.1.block_sparse_moe.gate.weight_scales"] = groups.scales_OG


def without_the_key(tensors, config):
    del config["quantization_config"]


def with_another_method(tensors, config):
    config["quantization_config"]["quant_method"] = "gptq"


def with_minimums(tensors, config):
    tensors[f"{QUERY}.weight_minimums"] = torch.zeros_like(tensors[f"{QUERY}.weight_scales"])


def with_a_nan(tensors, config):
    tensors[f"{QUERY}.weight_scales"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_scales, f"tensor {QUERY}.weight_scales is missing"),
        (without_weight, f"{DENSE}: tensor {QUERY}.weight_scales is unknown"),
        (with_wide_scales, f"{DENSE}: tensor {QUERY}.weight_scales has dtype F32, not one of F16"),
        (with_dense_weight, f"{DENSE}: tensor {QUERY}.weight_scales is unknown"),
        (with_short_groups, f"{DENSE}: tensor {QUERY}.weight has shape .32, 40."),
        (with_a_grouped_norm, f"{DENSE}: tensor model.norm.weight has dtype I8"),
        (with_a_grouped_router, f"{DENSE}: tensor model.layers.1.block_sparse_moe.gate.weight"),
        (without_the_key, f"{DENSE}: tensor .*(_scales is unknown|has shape)"),
        (with_another_method, "config.json: quantization_config"),
        (with_minimums, f"{DENSE}: tensor {QUERY}.weight_minimums is unknown"),
        (with_a_nan, f"{DENSE}: tensor {QUERY}.weight_scales has values that are NaN"),
    ],
)
def test_damaged_folders_are_refused_by_file_and_tensor(folders, tmp_path, damage, message):
    folder = shutil.copytree(folders["int8"], tmp_path / "damaged")
    tensors = load_file(folder / DENSE)
    config = json.loads((folder / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, folder / DENSE)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_folder_with_its_own_dense_layer_is_read(source, folders, tmp_path):
    folder = shutil.copytree(folders["int4"], tmp_path / "mixed")
    tensors = load_file(folder / DENSE)
    del tensors[f"{QUERY}.weight_scales"]
    tensors[f"{QUERY}.weight"] = load_file(source / DENSE)[f"{QUERY}.weight"]
    save_file(tensors, folder / DENSE)
    model, _ = load_model(folder, keep_stored=True)
    assert QUERY not in group_formats(model) and logits(model).isfinite().all()


def test_training_does_not_start_from_rounded_weights(folders):
    folder = str(folders["int8"])
    config = open_checkpoint(folders["int8"])[0].model
    for start in (lambda: model_config({}, 260, folder), lambda: new_model(config, 1, folder)):
        with pytest.raises(ConfigError, match=f"run.init_from: the weights of {folder} are round"):
            start()
    with pytest.raises(
        ConfigError, match="model.quantization_config: has no effect on training; remove it"
    ):
        model_config({"quantization_config": {}}, 260)


def test_rounded_weights_choose_other_rows(tmp_path, memory_plus_folder):
    convert(memory_plus_folder, tmp_path / "rounded", weight_dtype="int8")
    before, after = model_identity(memory_plus_folder), model_identity(tmp_path / "rounded")
    assert after.origins == before.origins and after.row_choice != before.row_choice
