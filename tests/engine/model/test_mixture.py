"""Mixtures of experts against transformers' Mixtral."""

import pytest
import torch
import transformers

from tests.conftest import TOLERANCE
from tests.models import (
    feed_forward_changes,
    plain_logits,
    random_model,
    served_logits,
    tiny_config,
)
from weights.checkpoints.checkpoint import load_model
from weights.training.loss import load_balancing_loss

IDS = [5, 1, 250, 3, 3, 17, 99, 42]


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    return transformers.MixtralForCausalLM(config).eval().requires_grad_(False)


def test_a_mixtral_folder_gives_the_logits_of_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "model")
    ours, config = load_model(tmp_path / "model")
    assert config.model.feed_forward == ("moe",) * 3
    wanted = theirs(torch.tensor([IDS])).logits[0]
    rtol, atol = TOLERANCE[torch.float32]
    found = plain_logits(ours, IDS)
    torch.testing.assert_close(found, wanted, rtol=10 * rtol, atol=100 * atol)
    torch.testing.assert_close(served_logits(ours, IDS), wanted, rtol=1e-4, atol=1e-3)


def test_the_balancing_loss_equals_that_of_transformers(theirs):
    logits = tuple(torch.randn(40, 5) for _ in range(3))
    wanted = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func(logits, 5, 2)
    torch.testing.assert_close(load_balancing_loss(logits, 2), wanted)


def test_even_use_of_experts_has_a_loss_of_top_k():
    even = torch.eye(6).repeat(3, 1)  # each expert is best for equally many tokens; the others tie
    torch.testing.assert_close(load_balancing_loss([even], 1), torch.tensor(1.0))


def test_no_tokens_give_no_rows():
    model = random_model(tiny_config(**feed_forward_changes("moe")))
    mixture = model.model.layers[0].block_sparse_moe
    assert mixture(torch.empty(0, 32), None).shape == (0, 32)
