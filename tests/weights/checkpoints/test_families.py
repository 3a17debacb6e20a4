"""Families of models have Hugging Face's defaults and give the logits of its classes."""

import json

import pytest
import torch
import transformers

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.eager import EagerExecutor
from engine.executors.executor import make_executor
from tests.hugging_face_models import KINDS, SIZES, greedy_answer, saved
from tests.models import byte_tokenizer, engine_of, greedy, plain_logits, run
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.config_json import parse_model
from weights.checkpoints.families import FAMILIES
from weights.errors import CheckpointError

IDS = [5, 77, 200, 31, 8, 150, 99, 12, 61, 240, 7, 3]


@pytest.fixture(scope="module", params=KINDS)
def hugging_face(request, tmp_path_factory):
    """A random model of Hugging Face's own class, and the folder that it was saved to."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return saved(request.param, folder), folder


def eager(model, config):
    return EagerExecutor(model, 16, config.block_size)


def test_logits_and_tokens_equal_those_of_transformers(hugging_face):
    model, folder = hugging_face
    loaded, _ = load_model(folder)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(plain_logits(loaded, IDS), expected, rtol=1e-4, atol=1e-4)
    for make in (make_executor, eager):
        engine = engine_of(loaded, EngineConfig(kv_cache_gib=0.001), make=make)
        assert run(engine, {0: [greedy("a", IDS, 8)]}) == {"a": greedy_answer(model, IDS, 8)}


def test_a_window_limits_the_positions(hugging_face):
    model, folder = hugging_face
    loaded, _ = load_model(folder)
    window = getattr(model.config, "sliding_window", None)
    assert loaded.config.max_positions == (window or 64)
    if window is not None:
        config = EngineConfig(kv_cache_gib=0.001, max_model_len=window + 1)
        with pytest.raises(ConfigError, match="24 positions .* sliding_window"):
            engine_of(loaded, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_missing_keys_have_the_defaults_of_hugging_face(name):
    config = transformers.AutoConfig.for_model(name)
    given = {"model_type": name, **SIZES, "hidden_size": 128, "num_attention_heads": 64}
    if name == "mixtral":
        given |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    found = parse_model(given)
    window = config.sliding_window if name == "mistral" else None
    assert found.max_positions == (window or config.max_position_embeddings)
    assert found.num_kv_heads == (64 if name == "llama" else config.num_key_value_heads)
    assert found.head_dim == (128 if name == "qwen3" else 2)
    assert found.rms_norm_eps == config.rms_norm_eps
    assert found.rope_theta == config.rope_parameters["rope_theta"]
    assert found.tie_embeddings == config.tie_word_embeddings


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_of_unknown_size_has_the_default_of_hugging_face(family):
    given = {"model_type": family, **SIZES, "num_key_value_heads": 2, "use_sliding_window": True}
    assert parse_model(given).max_positions == 4096
    config = transformers.AutoConfig.for_model(family, use_sliding_window=True)
    assert config.sliding_window == 4096


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_keys_that_a_family_does_not_use_change_nothing(family, key):
    given = {"model_type": family, **SIZES, "num_key_value_heads": 2}
    assert parse_model(given | {key: True}) == parse_model(given)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_missing_weight_of_the_family_is_named(name, tmp_path):
    raw = {"model_type": name, **SIZES, "num_key_value_heads": 2, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=8)
    plain = transformers.LlamaForCausalLM(config)
    plain.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    part = "q_proj.bias" if name == "qwen2" else "q_norm.weight"
    with pytest.raises(CheckpointError, match=f"self_attn.{part}"):
        load_model(tmp_path)
