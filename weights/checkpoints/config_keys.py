"""Keys of config.json that memplus does not use, with the values that change nothing."""

from collections.abc import Mapping
from typing import Any

from engine.model.weight_bits import GROUP

FORMAT_VERSION = 1

# weights in groups of 8 or 4 bits, as stored_groups.py describes
QUANTIZATION_KEY = "quantization_config"
QUANTIZATION = {"quant_method": "memplus", "group_size": GROUP}
# keys that change the computation: only these values are supported
FIXED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "auto_map": (),
    "chunk_size_feed_forward": (0,),
    "hidden_act": ("silu",),
    "is_encoder_decoder": (False,),
    "memplus_format": (FORMAT_VERSION,),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "pruned_heads": ({},),
    QUANTIZATION_KEY: (QUANTIZATION,),
    "rope_interleaved": (False,),
    "router_jitter_noise": (0,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
}
# keys that do not affect the model's output for given token ids
IGNORED_KEYS = {
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash"),
    *("_flash_attn_2_enabled", "_model_name_or_path", "_name_or_path", "attention_dropout"),
    *("attn_implementation", "bos_token_id", "dtype", "eos_token_id", "finetuning_task"),
    *("gradient_checkpointing", "id2label", "initializer_range", "is_decoder", "is_llama_config"),
    *("label2id", "max_sequence_length", "max_window_layers", "model_max_length"),
    *("neftune_noise_alpha", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("pad_token_id", "prefix", "problem_type", "return_dict", "sep_token_id"),
    *("task_specific_params", "tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript"),
    *("transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version"),
    *("unk_token_id", "use_bfloat16", "use_cache"),
    # defaults of generation, which old versions of transformers wrote here
    *("bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty"),
    *("do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"),
    *("length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups"),
    *("num_beams", "num_return_sequences", "output_scores", "remove_invalid_values"),
    *("repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature"),
    *("top_k", "top_p", "typical_p"),
}


def check_values(raw: Mapping[str, Any]) -> None:
    """Check the keys with fixed values; ``raw`` has no null values.

    Raises:
        ValueError: a value is not supported; the message begins with the key.
    """
    for key, allowed in FIXED_VALUES.items():
        if key in raw and raw[key] not in allowed:
            only = allowed[0] if allowed else None
            raise ValueError(f"{key}: {raw[key]!r} is not supported; must be {only!r}")
