"""Type, default and meaning of each key of the ``[model]`` section, except those of memories."""

from engine.model.config import MixtureConfig
from weights.checkpoints.config_json import CheckpointConfig, config_to_json, parse_model
from weights.checkpoints.window_json import USES_WINDOW

# (key, type, default, meaning); an empty default is one of ``default_values``
MODEL_SETTINGS = (
    ("hidden_size", "integer", "required", "width of the model"),
    ("intermediate_size", "integer", "required", "inner width of a dense feed-forward"),
    ("num_hidden_layers", "integer", "required", "number of layers"),
    ("num_attention_heads", "integer", "required", "heads of attention; must divide hidden_size"),
    (
        *("num_key_value_heads", "integer", "none"),
        "heads of keys and values; without it as many as num_attention_heads",
    ),
    (
        *("head_dim", "integer", "none"),
        "width of a head; without it hidden_size / num_attention_heads",
    ),
    ("max_position_embeddings", "integer", "", "longest text in tokens"),
    ("rms_norm_eps", "number", "", "added to the mean square in norms"),
    ("rope_theta", "number", "", "base of the rotary frequencies"),
    ("rope_scaling", "table", "none", "scaling of rotary frequencies, as in a config.json"),
    ("rope_parameters", "table", "none", "rope_theta and rope_scaling in one table"),
    ("tie_word_embeddings", "true or false", "", "use the embedding as the output layer too"),
    ("attention_bias", "true or false", "", "biases in the projections of attention"),
    ("mlp_bias", "true or false", "", "biases in dense feed-forwards"),
    ("num_local_experts", "integer", "none", "experts of each mixture; without it there is none"),
    ("num_experts_per_tok", "integer", "none", "experts that each token uses"),
    (
        "moe_layers",
        "list of integers",
        "none",
        "layers that are mixtures; without it all but memories",
    ),
    (
        "moe_intermediate_size",
        "integer",
        "none",
        "inner width of an expert; without it intermediate_size",
    ),
    ("router_aux_loss_coef", "number", "", "weight of the load-balancing loss of experts"),
    (
        "model_type",
        "text",
        "",
        "family of the model: llama, mistral, mixtral, qwen2 or qwen3",
    ),
    (
        "architectures",
        "list of texts",
        "none",
        "class of the model at Hugging Face; follows from model_type",
    ),
    ("sliding_window", "integer", "none", "window of attention, which limits the positions"),
    ("use_sliding_window", "true or false", "", "false ignores sliding_window"),
    ("layer_types", "list of texts", "none", "full_attention or sliding_attention, per layer"),
)


def default_values() -> dict[str, object]:
    """Values of the keys that a config.json may lack, as its reader fills them in."""
    required = dict.fromkeys(
        (key for key, _, default, _ in MODEL_SETTINGS if default == "required"), 2
    )
    least = parse_model({**required, "vocab_size": 1, "hidden_size": 4})
    return {
        **config_to_json(CheckpointConfig(least)),
        "router_aux_loss_coef": MixtureConfig.router_loss_weight,
        "use_sliding_window": USES_WINDOW,
    }
