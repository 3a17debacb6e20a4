"""Memory adapters: written from a trained model, and linked with their base."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

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
        ({"model": []}, "model: expected dict"),
        ({"novel": 1}, "novel: unknown key"),
        ({"model": {"hidden_size": 7}}, "vocab_size: missing"),
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
    with pytest.raises(CheckpointError, match=r"tensor memory\.table is missing") as caught:
        link_adapter(folder / "base", tmp_path / "adapter", tmp_path / "both")
    assert str(caught.value).startswith(str(tmp_path / "adapter"))
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "memory.other"])
def test_a_tensor_that_is_not_of_a_memory_is_refused(made, tmp_path, name):
    _, folder = made
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / ("model.safetensors" if "norm" in name else "more.safetensors")
    stored = load_file(file) if file.exists() else {}
    save_file(stored | {name: torch.ones(32)}, file)
    if "other" in name:
        file.rename(tmp_path / "adapter" / "model-1.safetensors")
        (tmp_path / "adapter" / "model.safetensors").rename(
            tmp_path / "adapter" / "model-2.safetensors"
        )
    with pytest.raises(CheckpointError, match="is not part of a memory adapter"):
        link_adapter(folder / "base", tmp_path / "adapter", tmp_path / "both")


def test_an_index_is_refused(made, tmp_path):
    _, folder = made
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a memory adapter has no index"):
        link_adapter(folder / "base", tmp_path / "adapter", tmp_path / "both")


def test_a_base_with_another_config_is_refused(made, tmp_path):
    _, folder = made
    shutil.copytree(folder / "base", tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 5e5}))
    message = r"^rope_theta: is 10000\.0 with the adapter's memories, but 500000\.0 in the base"
    with pytest.raises(ConfigError, match=message):
        link_adapter(tmp_path / "base", folder / "adapter", tmp_path / "both")
    with pytest.raises(ConfigError, match=message):
        write_adapter(folder / "grown", tmp_path / "base", tmp_path / "out")


def test_weights_that_changed_are_not_an_adapter(made, tmp_path):
    grown, folder = made
    changed = random_model(grown.config)
    changed.load_state_dict(grown.state_dict())
    changed.model.norm.weight[3] += 1
    save_model(changed, tmp_path / "changed")
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight has other values"):
        write_adapter(tmp_path / "changed", folder / "base", tmp_path / "out")


def test_a_narrow_base_and_wide_memories(made, tmp_path):
    grown, folder = made
    convert(folder / "base", tmp_path / "base", "bfloat16")
    wide = random_model(grown.config)
    wide.load_state_dict(
        grown.state_dict() | load_model(tmp_path / "base", "float32")[0].state_dict()
    )
    save_model(wide, tmp_path / "wide")
    write_adapter(tmp_path / "wide", tmp_path / "base", tmp_path / "adapter")
    link_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "both")
    assert torch.equal(
        plain_logits(load_model(tmp_path / "both", "float32")[0], IDS),
        plain_logits(load_model(tmp_path / "wide")[0], IDS),
    )
    # auto follows the embedding
    assert load_model(tmp_path / "both")[0].dtype is torch.bfloat16


def test_lists_of_rows_are_kept(made, tmp_path):
    _, folder = made
    shutil.copytree(folder / "grown", tmp_path / "grown")
    for name in ("hot_rows.safetensors", "row_reads.safetensors"):
        (tmp_path / "grown" / name).write_bytes(b"list")
    write_adapter(tmp_path / "grown", folder / "base", tmp_path / "adapter")
    link_adapter(folder / "base", tmp_path / "adapter", tmp_path / "both")
    for name in ("hot_rows.safetensors", "row_reads.safetensors"):
        assert (tmp_path / "both" / name).read_bytes() == b"list"
