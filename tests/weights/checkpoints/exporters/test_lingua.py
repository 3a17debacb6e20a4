"""Export to facebookresearch/memory: what was imported comes back bit for bit."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ConfigError
from engine.model.rope_scaling import Llama3Scaling
from server.cli.main import main
from tests.conftest import TOLERANCE
from tests.models import feed_forward_changes, plain_logits, random_model, save_model, tiny_config
from tests.weights.checkpoints.exporters import lingua_reader
from tests.weights.checkpoints.importers.test_lingua import GOLDEN, VARIANTS, golden, write_run
from weights.checkpoints.config_json import read_config
from weights.checkpoints.convert import convert
from weights.checkpoints.exporters.lingua import export_lingua
from weights.checkpoints.importers.lingua_names import TIED_HEAD
from weights.checkpoints.tensor_files import list_tensors, read_mapped
from weights.errors import CheckpointError

KINDS = [
    {},
    {"intermediate_size": 200},
    {"intermediate_size": 84},
    {"intermediate_size": 70_000, "num_layers": 1},
    {"head_dim": 64},
    {"tie_embeddings": True},
    feed_forward_changes("dense", "memory_plus", "memory_plus"),
    feed_forward_changes("memory_plus", "dense", value_dim=24, share_values=False),
    feed_forward_changes("dense", "pkm", "dense", "pkm", output_gate=True),
    feed_forward_changes("pkm", "dense", value_projection=True),
    feed_forward_changes("pkm", "dense", value_projection=True, value_dim=20),
    feed_forward_changes("peer", "dense", "peer"),
    feed_forward_changes("peer", "peer", share_values=False),
]


def stored(folder):
    return {name: read_mapped(one) for name, one in list_tensors(folder).items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_imported_run_comes_back_bit_for_bit(tmp_path, tokenizer, variant):
    tensors, params = golden(variant)
    convert(write_run(tmp_path / "run", tensors, params), tmp_path / "ours", tokenizer=tokenizer)
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "lingua"]) == 0
    place = tmp_path / "out" / "consolidated"
    found = torch.load(place / "consolidated.pth", weights_only=True)["model"]
    is_peer = params["model"]["productkey_args"]["peer_variant"]
    unused = ("value_proj", "swilu_projection") if is_peer else ()
    tensors |= {TIED_HEAD: tensors["tok_embeddings.weight"]} if variant == "plain" else {}
    wanted = {n: t for n, t in tensors.items() if not any(part in n for part in unused)}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)
    made = json.loads((place / "params.json").read_text())["model"]
    memory, given = made.pop("productkey_args"), params["model"].pop("productkey_args")
    # other numbers may give the same width, and PEER has no gate
    free = {"multiple_of", "ffn_dim_multiplier", *(["swilu_projection"] if is_peer else [])}
    for mine, theirs in ((made, params["model"]), (memory, given)):
        for key in mine.keys() - free:
            assert mine[key] == theirs[key], key
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reader_of_these_tests_gives_the_expected_logits(tmp_path, variant):
    run = write_run(tmp_path / "run", *golden(variant)) / "consolidated"
    expected = load_file(GOLDEN / f"lingua_{variant}" / "expected.safetensors")
    found = lingua_reader.logits(run, expected["ids"])
    torch.testing.assert_close(found, expected["logits"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", KINDS)
def test_an_exported_model_has_the_same_logits_by_the_repositorys_formulas(tmp_path, changes):
    model = random_model(tiny_config(**changes))
    export_lingua(save_model(model, tmp_path / "ours"), tmp_path / "out")
    ids = torch.randint(0, 200, (19,))
    exact = lingua_reader.logits(tmp_path / "out" / "consolidated", ids)
    rtol, atol = TOLERANCE[torch.float32]
    found = plain_logits(model, ids.tolist()).double()
    torch.testing.assert_close(found, exact, rtol=100 * rtol, atol=100 * atol)


@pytest.mark.parametrize("changes", KINDS)
def test_an_exported_model_is_imported_again(tmp_path, tokenizer, changes):
    folder = save_model(random_model(tiny_config(**changes)), tmp_path / "ours")
    export_lingua(folder, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again", tokenizer=tokenizer)
    assert read_config(tmp_path / "again").model == read_config(folder).model
    first, second = stored(folder), stored(tmp_path / "again")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 8192)}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias"),
        ({"qkv_bias": True}, "attention_bias"),
        ({"qk_norm": True}, "qk_norm"),
        ({"mlp_bias": True}, "mlp_bias"),
        (feed_forward_changes("dense", "moe"), "num_local_experts"),
        (feed_forward_changes("memory_plus", "dense", qk_norm=True), "memory.qk_norm"),
        (feed_forward_changes("memory_plus", "pkm"), "memory.layers"),
        (feed_forward_changes("memory_plus", placement="beside"), "memory.placement"),
        (feed_forward_changes("memory_plus", scalar_gate=True), "memory.scalar_gate"),
    ],
)
def test_models_that_the_repository_does_not_have_are_refused(tmp_path, changes, field):
    folder = save_model(random_model(tiny_config(**changes)), tmp_path / "ours")
    with pytest.raises(ConfigError, match=f"^{field}: "):
        export_lingua(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_and_weights_of_few_bits_are_refused(tmp_path):
    config = tiny_config(**feed_forward_changes("memory_plus", "dense"))
    folder = save_model(random_model(config), tmp_path / "ours")
    convert(folder, tmp_path / "rows", table_dtype="int8")
    with pytest.raises(ConfigError, match=r"^memory\.table: .*--dtype"):
        export_lingua(tmp_path / "rows", tmp_path / "out")
    convert(folder, tmp_path / "groups", weight_dtype="int8")
    with pytest.raises(ConfigError, match="^quantization_config: "):
        export_lingua(tmp_path / "groups", tmp_path / "out")


def test_a_folder_that_exists_is_not_replaced(tmp_path):
    folder = save_model(random_model(tiny_config()), tmp_path / "ours")
    with pytest.raises(CheckpointError, match="exists already"):
        export_lingua(folder, folder)
    assert dataclasses.asdict(read_config(folder).model)["num_layers"] == 2
