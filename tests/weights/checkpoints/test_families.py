"""Families of models: Hugging Face's defaults, and the logits of its own classes."""

import json

import pytest
import torch
import transformers

from engine.config import EngineConfig
from engine.errors import ConfigError
from tests.models import byte_tokenizer, engine_of, greedy, plain_logits, run
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.config_json import parse_model
from weights.checkpoints.families import FAMILIES
from weights.errors import CheckpointError

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
KINDS = {
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "qwen3 with biases": {"num_key_value_heads": 1, "head_dim": 8, "attention_bias": True},
    "mistral": {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": None},
    "mistral with a window": {"num_key_value_heads": 4, "sliding_window": 24},
    "llama": {"num_key_value_heads": 2, "head_dim": 6, "attention_bias": True},
}
IDS = [5, 77, 200, 31, 8, 150, 99, 12, 61, 240, 7, 3]


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """A random model of Hugging Face's own class, and the folder that it was saved to."""
    family = request.param.split()[0]
    config = transformers.AutoConfig.for_model(
        family, **SIZES, **KINDS[request.param], max_position_embeddings=64, bos_token_id=None
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    folder = tmp_path_factory.mktemp(family)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return model, folder


def test_logits_and_tokens_equal_those_of_transformers(saved):
    model, folder = saved
    loaded = load_model(folder)[0]
    ids = torch.tensor([IDS])
    with torch.no_grad():
        expected = model(ids).logits[0]
        answer = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=-1)[
            0, len(IDS) :
        ]
    torch.testing.assert_close(plain_logits(loaded, IDS), expected, rtol=1e-4, atol=1e-4)
    served = run(engine_of(loaded, EngineConfig(kv_cache_gib=0.001)), {0: [greedy("a", IDS, 8)]})
    assert served == {"a": answer.tolist()}


def test_a_window_limits_the_positions(saved):
    model, folder = saved
    loaded = load_model(folder)[0]
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
