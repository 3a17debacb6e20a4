"""Layers in groups: which they may be, their rows, and their dense weights."""

import pytest
import torch
from torch import nn

from engine.model.grouped_layers import (
    GroupedEmbedding,
    dense_state,
    group_formats,
    groupable,
    use_groups,
)
from engine.model.grouped_weights import GroupFormat, WeightGroups, dense_weights, group_weights
from engine.model.transformer import Transformer
from tests.models import feed_forward_changes, tiny_config

FORMATS = [GroupFormat(8), GroupFormat(4), GroupFormat(4, has_minimums=True)]
each_format = pytest.mark.parametrize("group_format", FORMATS, ids=str)


def drawn(outputs, inputs, group_format):
    groups = group_weights(torch.randn(outputs, inputs), group_format.bits)
    if group_format.has_minimums:
        return groups._replace(minimums_OG=torch.randn_like(groups.scales_OG))
    return groups


@each_format
def test_rows_of_an_embedding_are_those_of_its_dense_weights(group_format):
    embedding, groups = GroupedEmbedding(11, 40, group_format), drawn(11, 40, group_format)
    embedding.load_state_dict(groups.tensors)
    ids = torch.tensor([3, 3, 10, 0])
    found = embedding.rows(ids, torch.float32)
    assert found.is_contiguous() and torch.equal(found, embedding.dense(torch.float32)[ids])
    assert torch.equal(embedding.dense(torch.float32), dense_weights(groups, 40, torch.float32))


@pytest.mark.parametrize("bits", [8, 4])
def test_an_embedding_is_rounded_like_any_weight(bits):
    embedding = nn.Embedding(11, 40)
    found, wanted = GroupedEmbedding.rounded(embedding, bits), group_weights(embedding.weight, bits)
    assert isinstance(found.groups, WeightGroups) and found.groups.format == GroupFormat(bits)
    assert all(torch.equal(found.groups.tensors[name], one) for name, one in wanted.tensors.items())


def test_layers_that_choose_or_scale_are_never_in_groups():
    changes = feed_forward_changes("moe", "memory_plus", "pkm", output_gate=True)
    model = Transformer(tiny_config(**changes, tie_embeddings=False))
    names = groupable(model)
    assert {"model.embed_tokens", "lm_head", "model.layers.1.memory.query"} <= names
    assert not any(name.endswith((".output_gate", "block_sparse_moe.gate")) for name in names)


@each_format
def test_the_state_of_a_model_in_groups_is_made_dense(group_format):
    model = Transformer(tiny_config())
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    chosen = dict.fromkeys(groupable(model), group_format)
    use_groups(model, chosen)
    assert group_formats(model) == chosen
    assert model.state_dict()["model.embed_tokens.weight_scales"].dtype is torch.float16
    state = dense_state(model, torch.bfloat16)
    assert {name: value.shape for name, value in state.items()} == shapes
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
