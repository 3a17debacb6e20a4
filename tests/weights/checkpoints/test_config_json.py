"""config.json: read strictly, written so that it reads back."""

import json

import pytest
import transformers

from engine.model.config import MemoryConfig, MixtureConfig
from engine.model.rope_scaling import Llama3Scaling
from tests.models import feed_forward_changes, tiny_config
from weights.checkpoints.config_json import (
    CheckpointConfig,
    config_to_json,
    parse_model,
    read_config,
)
from weights.errors import CheckpointError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
MEMORY = {
    "layers": {"1": "memory_plus", "3": "pkm"},
    "num_heads": 2,
    "num_subkeys": 8,
    "top_k": 3,
    "query_dim": 8,
    "value_dim": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(tmp_path, **changes):
    raw = {name: value for name, value in (LLAMA | changes).items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return read_config(tmp_path)


def test_missing_keys_have_the_defaults_of_hugging_face(tmp_path):
    config = read(tmp_path)
    model = config.model
    assert (model.num_kv_heads, model.head_dim, model.max_positions) == (8, 8, 2048)
    assert (model.rms_norm_eps, model.rope_theta, model.tie_embeddings) == (1e-6, 10_000.0, False)
    assert (config.eos_ids, config.bos_id, config.dtype) == (frozenset({2}), 1, "bfloat16")


def test_rope_keys_of_old_and_new_transformers_are_read(tmp_path):
    expected = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    old = read(tmp_path, rope_theta=500_000.0, rope_scaling=LLAMA3_ROPE).model
    new = read(tmp_path, rope_parameters=LLAMA3_ROPE | {"rope_theta": 500_000.0}).model
    plain = read(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e5}).model
    assert old.rope_scaling == new.rope_scaling == expected and plain.rope_scaling is None
    assert old.rope_theta == new.rope_theta == plain.rope_theta == 500_000.0


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 1.0},
        {"type": "dynamic", "factor": 1},
        {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0},
        {"rope_type": "linear", "factor": 1.0, "original_max_position_embeddings": None},
        {},
    ],
)
def test_rope_settings_that_change_nothing_are_accepted(tmp_path, scaling):
    for changes in ({"rope_scaling": scaling}, {"rope_parameters": scaling | {"rope_theta": 5e5}}):
        model = read(tmp_path, **changes).model
        assert model.rope_scaling is None
        assert model.rope_theta == (5e5 if "rope_parameters" in changes else 1e4)


def test_the_same_rope_settings_may_stand_in_both_places(tmp_path):
    both = {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5, "type": "llama3"}}
    model = read(tmp_path, **both, rope_scaling=LLAMA3_ROPE).model
    assert (model.rope_scaling, model.rope_theta) == (Llama3Scaling(8.0, 1.0, 4.0, 8192), 5e5)
    with pytest.raises(CheckpointError, match="rope_scaling: differs from rope_parameters"):
        read(tmp_path, **both, rope_scaling=LLAMA3_ROPE | {"factor": 2.0})


NEUTRAL = {
    **transformers.LlamaConfig(**LLAMA).to_dict(),
    "layer_types": ["full_attention"] * 4,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 2,
    "quantization_config": None,
    "auto_map": None,
    "num_experts": None,
    "partial_rotary_factor": 1.0,
    "tokenizer_class": "LlamaTokenizer",
    "neftune_noise_alpha": 5.0,
    "pruned_heads": {},
    "temperature": 0.6,
    # of a model that transformers read from a GGUF file
    "_model_name_or_path": "Smollm2 135M 8k",
    "unk_token_id": 0,
}


@pytest.mark.parametrize("key", sorted(set(NEUTRAL) - set(LLAMA)))
def test_keys_that_change_nothing_are_accepted(key):
    sliding = {"use_sliding_window": False} if key == "sliding_window" else {}
    neutral = LLAMA | sliding | {key: NEUTRAL[key]}
    assert parse_model(neutral) == parse_model(LLAMA)


def test_a_config_that_hugging_face_writes_is_accepted():
    assert parse_model(NEUTRAL) == parse_model(LLAMA)


def test_generation_config_names_the_end_tokens(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read(tmp_path).eos_ids == {2, 7}


def test_memory_layers_are_listed_one_by_one(tmp_path):
    model = read(tmp_path, memory=MEMORY | {"qk_norm": True}).model
    assert model.feed_forward == ("dense", "memory_plus", "dense", "pkm")
    assert model.memory == MemoryConfig(2, 8, 3, 8, 64, qk_norm=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": "4096"}, "sliding_window"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "layer_types"),
        ({"layer_types": 4}, "layer_types"),
        ({"use_mrope": True}, "use_mrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: unknown key"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected dict"),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": ["LlamaModel"]}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"model_type": "qwen2"}, "architectures: LlamaForCausalLM is no class of qwen2"),
        ({"memplus_format": 2}, "memplus_format"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_scaling": {"rope_type": "yarn", "mscale": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling"),
        ({"memory": MEMORY | {"banks": 2}}, "memory.banks"),
        ({"memory": {"layers": {"1": "pkm"}}}, "memory.num_heads"),
        ({"memory": MEMORY | {"top_k": "3"}}, "memory.top_k"),
        ({"memory": MEMORY | {"top_k": 9}}, "top_k"),
        ({"memory": MEMORY | {"layers": {"4": "pkm"}}}, "memory.layers"),
        ({"memory": MEMORY | {"layers": {"-1": "pkm"}}}, "memory.layers"),
        ({"memory": MEMORY | {"layers": {"1": "sparse"}}}, "feed_forward"),
        ({"memory": MEMORY | {"layers": [1]}}, "memory.layers"),
        ({"memory": []}, "memory"),
        ({"hidden_size": 2**62}, "hidden_size"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"memory": MEMORY | {"num_subkeys": 70_000}}, "num_subkeys"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": float("inf")}}, "factor"),
    ],
)
def test_unsupported_values_are_refused_by_name(tmp_path, changes, named):
    with pytest.raises(CheckpointError, match="config.json") as caught:
        read(tmp_path, **changes)
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000])
def test_a_broken_file_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json"):
        read_config(tmp_path)


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


def test_a_mixtral_has_experts_everywhere_and_its_own_defaults(tmp_path):
    plain = {key: value for key, value in LLAMA.items() if key != "architectures"}
    model = parse_model({**plain, **MIXTRAL, "sliding_window": None, "router_jitter_noise": 0.0})
    assert model.feed_forward == ("moe",) * 4
    assert model.mixture == MixtureConfig(8, 2, expert_size=128)
    assert (model.num_kv_heads, model.rope_theta, model.rms_norm_eps) == (8, 1e6, 1e-5)
    unset = dict.fromkeys(("num_local_experts", "moe_layers", "router_jitter_noise", "memory"))
    assert parse_model({**LLAMA, **unset}).feed_forward == ("dense",) * 4
    mixed = parse_model({**plain, **MIXTRAL, "memory": MEMORY, "moe_intermediate_size": 7})
    assert mixed.feed_forward == ("moe", "memory_plus", "moe", "pkm")
    assert mixed.mixture is not None and mixed.mixture.expert_size == 7


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_local_experts": None}, "num_local_experts: missing"),
        ({"num_local_experts": 0}, "num_local_experts: must be greater than 0"),
        ({"num_experts_per_tok": -2}, "num_experts_per_tok: must be greater than 0"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size: must be greater than 0"),
        ({"num_local_experts": None, "num_experts_per_tok": None}, "num_local_experts: missing"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures: LlamaForCausalLM is no class"),
        ({"mlp_bias": True}, "mlp_bias: needs dense feed-forwards"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: 9 exceeds"),
        ({"moe_layers": [4]}, "moe_layers: 4 is not a layer"),
        ({"moe_layers": [1, 1]}, "moe_layers: layer 1 is already moe"),
        ({"moe_layers": 1}, "moe_layers: expected list"),
        ({"moe_layers": [1], "memory": MEMORY}, "moe_layers: layer 1 is already memory_plus"),
        ({"moe_layers": []}, "num_local_experts: must be given"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise: 0.1 is not supported"),
        ({"model_type": "llama"}, "model_type: must be mixtral"),
    ],
)
def test_impossible_experts_are_refused_by_name(changes, named):
    plain = {key: value for key, value in LLAMA.items() if key != "architectures"}
    with pytest.raises(ValueError, match=named):
        parse_model({**plain, **MIXTRAL, **changes})


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        tiny_config(rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64), tie_embeddings=True),
        tiny_config(
            feed_forward=("pkm", "memory_plus"),
            memory=MemoryConfig(2, 8, 3, 8, 24, share_values=False, value_projection=True),
        ),
        tiny_config(**feed_forward_changes("moe", "dense", "peer")),
        tiny_config(**feed_forward_changes("pkm", placement="beside", scalar_gate=True)),
        tiny_config(qkv_bias=True),
        tiny_config(qk_norm=True, **feed_forward_changes("memory_plus", "dense")),
        tiny_config(qk_norm=True, attention_bias=True),
    ],
)
def test_a_written_config_reads_back(tmp_path, model):
    config = CheckpointConfig(model, frozenset({1, 5}), bos_id=0, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(config)))
    assert read_config(tmp_path) == config
