"""Memory adapters: written from a trained model, and linked with their base."""

import json
import shutil

import pytest
import torch

from engine.errors import ConfigError
from engine.model.config import MemoryConfig
from tests.memory_adapters import IDS, grown_model
from tests.models import plain_logits, random_model, random_weights, save_model, tiny_config
from weights.adapters.adapter_files import DESCRIPTION
from weights.adapters.memory_adapter import link_adapter, write_adapter
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.convert import convert
from weights.checkpoints.tokenizer import load_tokenizer
from weights.errors import CheckpointError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return grown_model(folder), folder


def test_a_base_with_its_adapter_is_the_grown_model(made, tmp_path):
    grown, folder = made
    link_adapter(folder / "base", folder / "adapter", tmp_path / "both")
    loaded, config = load_model(tmp_path / "both")
    assert config.model == grown.config
    assert torch.equal(plain_logits(loaded, IDS), plain_logits(grown, IDS))
    tokenizers = [load_tokenizer(one) for one in (tmp_path / "both", folder / "base")]
    assert tokenizers[0].encode("ab") == tokenizers[1].encode("ab")
    assert {file.name for file in (folder / "adapter").iterdir()} == {
        DESCRIPTION,
        "model.safetensors",
        "table-00000.safetensors",
    }
    # nothing of the base is in the adapter
    size = sum(file.stat().st_size for file in (folder / "adapter").iterdir())
    assert size < sum(file.stat().st_size for file in (folder / "grown").iterdir()) / 2


@pytest.mark.parametrize("table_dtype", ["int8", "int4", "bfloat16"])
def test_rows_of_few_bits_stay_so(made, tmp_path, table_dtype):
    _, folder = made
    convert(folder / "grown", tmp_path / "grown", table_dtype=table_dtype)
    write_adapter(tmp_path / "grown", folder / "base", tmp_path / "adapter")
    link_adapter(folder / "base", tmp_path / "adapter", tmp_path / "both")
    found, wanted = (load_model(tmp_path / name, "float32")[0] for name in ("both", "grown"))
    assert torch.equal(plain_logits(found, IDS), plain_logits(wanted, IDS))


def test_a_sharded_base(made, tmp_path):
    grown, folder = made
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(grown.state_dict(), "model-00001-of-00001.safetensors")
    names = {name: file for name, file in names.items() if ".memory." not in name}
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    link_adapter(base, folder / "adapter", tmp_path / "both")
    loaded, _ = load_model(tmp_path / "both")
    assert torch.equal(plain_logits(loaded, IDS), plain_logits(grown, IDS))


def test_an_adapter_of_another_base_is_refused(made, tmp_path):
    _, folder = made
    save_model(random_weights(tiny_config()), tmp_path / "other")
    with pytest.raises(CheckpointError, match="base: the adapter was made for the weights"):
        link_adapter(tmp_path / "other", folder / "adapter", tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_a_base_with_memories_is_refused(made, tmp_path):
    _, folder = made
    for call in (
        lambda: link_adapter(folder / "grown", folder / "adapter", tmp_path / "out"),
        lambda: write_adapter(folder / "grown", folder / "grown", tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match="memory_adapter: .* has memory layers already"):
            call()
    assert not (tmp_path / "out").exists()


def test_memories_that_replace_feed_forwards_are_no_adapter(made, tmp_path):
    _, folder = made
    kinds = ("memory_plus", "dense")
    memory = MemoryConfig(2, 8, 3, query_dim=8, value_dim=32)
    replaced = random_model(tiny_config(feed_forward=kinds, memory=memory))
    save_model(replaced, tmp_path / "replaced")
    with pytest.raises(ConfigError, match="must be beside feed-forwards"):
        write_adapter(tmp_path / "replaced", folder / "base", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memplus_memory_adapter": 2}, "memplus_memory_adapter: 2 is not supported"),
        ({"memplus_memory_adapter": None}, "memplus_memory_adapter: expected int"),
        ({"base": 5}, "base: expected str"),
        ({"memory": []}, "memory: expected dict"),
        ({"novel": 1}, "novel: unknown key"),
        ({"memory": {"layers": {"7": "pkm"}}}, "memory"),
    ],
)
def test_a_wrong_description_is_refused(made, tmp_path, change, message):
    _, folder = made
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / DESCRIPTION
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        link_adapter(folder / "base", tmp_path / "adapter", tmp_path / "both")
    assert DESCRIPTION in str(caught.value)
    assert not (tmp_path / "both").exists()


def test_an_adapter_without_a_weight_is_refused(made, tmp_path):
    _, folder = made
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "table-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tensor memory\.table is missing"):
        link_adapter(folder / "base", tmp_path / "adapter", tmp_path / "both")
    assert not (tmp_path / "both").exists()
