"""The model with random memory layers: its shape and its reproducibility."""

import pytest
import torch

from benchmarks.random_memory import write_variant
from tests.models import random_model, save_model, tiny_config
from weights.checkpoints.checkpoint import load_model
from weights.errors import CheckpointError


@pytest.fixture
def plain(tmp_path):
    return save_model(random_model(tiny_config(num_layers=8)), tmp_path / "plain")


def test_three_feed_forwards_become_memory_layers_and_the_rest_stays(plain, tmp_path):
    write_variant(plain, tmp_path / "variant", 64)
    before, _ = load_model(plain)
    model, config = load_model(tmp_path / "variant")
    assert config.model.memory_layers == (2, 4, 6)
    assert config.model.memory.num_rows == 4096 and config.model.memory.top_k == 32
    theirs, ours = before.state_dict(), model.state_dict()
    for name in theirs.keys() & ours.keys():
        assert torch.equal(theirs[name], ours[name])
    new = [name for name in ours if ".memory." in name and not name.endswith("bias")]
    assert new and all(ours[name].std() > 0 for name in new)


def test_the_variant_is_reproducible(plain, tmp_path):
    for name in ("one", "other"):
        write_variant(plain, tmp_path / name, 64)
    for file in ("model.safetensors", "table-00000.safetensors"):
        one, other = (tmp_path / name / file for name in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()


def test_unsuitable_models_are_rejected(plain, tmp_path):
    with pytest.raises(ValueError, match="top_k"):
        write_variant(plain, tmp_path / "variant", 16)
    write_variant(plain, tmp_path / "variant", 64)
    for source, target in ((tmp_path / "variant", tmp_path / "new"), (plain, tmp_path / "variant")):
        with pytest.raises(CheckpointError):
            write_variant(source, target, 64)
