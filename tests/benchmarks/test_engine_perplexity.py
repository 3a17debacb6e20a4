"""Perplexity by an engine against the model's own log-probabilities."""

import math

import pytest
import torch

from benchmarks import engine_perplexity
from benchmarks.engine_perplexity import perplexity
from engine.config import EngineConfig
from engine.errors import ConfigError
from tests.models import engine_of, random_model, tiny_config
from weights.training.loss import batch_output
from weights.training.packing import Passage, packed

CONFIG = EngineConfig(
    max_num_seqs=4, max_batched_tokens=16, block_size=4, kv_cache_gib=0.001, max_model_len=64
)


@pytest.mark.parametrize("at_once", [1, 64])
def test_all_tokens_but_the_first_of_each_prompt_count(at_once, monkeypatch):
    monkeypatch.setattr(engine_perplexity, "_AT_ONCE", at_once)
    model = random_model(tiny_config())
    # one has no token to score; two begin alike, and share a prefix in the cache
    prompts = [[5], [1, 2], [*range(40)], [*range(20), 7], [9] * 64]
    scores = []
    for ids in prompts[1:]:
        with torch.no_grad():
            logits = batch_output(model, packed([Passage(tuple(ids))]), torch.float32).logits_LV
        chosen = logits.double().log_softmax(dim=1).gather(1, torch.tensor(ids[1:])[:, None])
        scores += chosen.flatten().tolist()
    engine = engine_of(model, CONFIG)
    found = perplexity(engine, prompts)
    assert found == pytest.approx(math.exp(-sum(scores) / len(scores)), rel=1e-5)
    assert not engine.has_work


def test_a_text_of_one_token_is_refused():
    with pytest.raises(ConfigError, match="text: must have at least two tokens"):
        perplexity(engine_of(random_model(tiny_config()), CONFIG), [[1], []])
