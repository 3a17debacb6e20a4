"""Tied embeddings: stored once under either name, or twice with equal values."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import random_model, save_model, tiny_config
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.convert import convert
from weights.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path):
    model = random_model(tiny_config(tie_embeddings=True), torch.bfloat16)
    return save_model(model, tmp_path / "model")


def rewrite(folder, change, metadata=None) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata)


def embedding_of(folder) -> torch.Tensor:
    return load_model(folder)[0].model.embed_tokens.weight


@pytest.mark.parametrize("metadata", [None, {EMBEDDING: HEAD, "format": "pt"}])
def test_the_embedding_may_be_stored_as_the_head(folder, tmp_path, metadata):
    wanted = embedding_of(folder).clone()
    rewrite(folder, lambda t: t.update({HEAD: t.pop(EMBEDDING)}), metadata)
    assert torch.equal(embedding_of(folder), wanted)
    convert(folder, tmp_path / "copy")
    assert set(load_file(tmp_path / "copy" / "model.safetensors")) >= {EMBEDDING}
    assert torch.equal(embedding_of(tmp_path / "copy"), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_head_may_be_stored_again_with_the_same_values(folder, dtype):
    wanted = embedding_of(folder).clone()
    rewrite(folder, lambda t: t.update({HEAD: t[EMBEDDING].to(dtype, copy=True)}))
    assert torch.equal(embedding_of(folder), wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda embedding: embedding + 1,
        lambda embedding: embedding[:-1].clone(),
        lambda embedding: embedding.to(torch.int32),
        lambda embedding: embedding.float() * (1 + 2**-12),
    ],
)
def test_a_head_with_other_values_is_refused(folder, change):
    rewrite(folder, lambda t: t.update({HEAD: change(t[EMBEDDING]).contiguous()}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model.embed_tokens"):
        load_model(folder)


def test_the_one_stored_tensor_is_checked(folder):
    rewrite(folder, lambda t: t.update({HEAD: t.pop(EMBEDDING).to(torch.int32)}))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has dtype I32"):
        load_model(folder)
    rewrite(folder, lambda t: t.update({EMBEDDING: t[HEAD].clone()}))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has dtype I32"):
        load_model(folder)
    rewrite(folder, lambda t: (t.pop(HEAD), t.pop(EMBEDDING)))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is missing"):
        load_model(folder)


def test_an_untied_model_needs_its_head(tmp_path):
    folder = save_model(random_model(tiny_config()), tmp_path / "model")
    rewrite(folder, lambda t: t.pop(HEAD))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        load_model(folder)
