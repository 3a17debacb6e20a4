"""Writes a checkpoint folder as one that transformers loads, with code for memory layers."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.rotary import rope_amplitude, rope_frequencies
from memory_ops.row_formats import RowRecords, dequantize_rows
from weights.checkpoints.added_tokens import CONFIG_FILE
from weights.checkpoints.checkpoint import open_checkpoint, serving_dtype
from weights.checkpoints.config_json import CheckpointConfig, config_to_json
from weights.checkpoints.convert import read_folder
from weights.checkpoints.exporters.sentencepiece_json import sentencepiece_json
from weights.checkpoints.hot_rows import HOT_ROWS_FILE
from weights.checkpoints.new_folder import new_folder, write_synced
from weights.checkpoints.sentencepiece_tokenizer import SentencePieceTokenizer
from weights.checkpoints.table_files import stored_format, table_shape
from weights.checkpoints.tensor_files import StoredTensor, TensorSource, has_checksum, read_parts
from weights.checkpoints.tensor_writer import write_tensors
from weights.checkpoints.tokenizer import load_tokenizer
from weights.errors import CheckpointError
from weights.text_files import read_json_object

_CODE = Path(__file__).parent / "remote_code"
_CODE_FILES = ("configuration_memplus.py", "memory_memplus.py", "modeling_memplus.py")
_JSON_CLASS = "PreTrainedTokenizerFast"
# our field of ModelConfig -> the exported config's key
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_positions": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "qkv_bias": "qkv_bias",
    "qk_norm": "qk_norm",
    "mlp_bias": "mlp_bias",
}
# all fields that the exported code knows, by part of the model; others must have their defaults
_KNOWN = {
    "": {*_KEYS, "rope_theta", "rope_scaling", "feed_forward", "memory", "mixture"},
    "memory": {
        *("num_heads", "num_subkeys", "top_k", "query_dim", "value_dim", "share_values"),
        *("qk_norm", "value_projection", "output_gate", "placement", "scalar_gate"),
    },
    "mixture": {"num_experts", "top_k", "expert_size", "router_loss_weight"},
}
# our keys of config.json that transformers' own models do not have
_OWN_KEYS = ("memplus_format", "moe_layers", "moe_intermediate_size")


def export_transformers(source: Path, target: Path, dtype: str | None = None) -> None:
    """Write a checkpoint folder's model into the new folder ``target``.

    A model without memory layers becomes one of transformers' own, unless its experts differ from
    Mixtral's. Others bring the code of ``remote_code`` and need ``trust_remote_code=True``. Holds
    one tensor in memory at a time, and some rows of a table. Shows progress on stderr.

    Args:
        source: a checkpoint folder.
        target: folder to create.
        dtype: one of ``OUTPUT_DTYPES`` for all tensors. None keeps floating dtypes; weights and
            rows of few bits then get the dtype that ``memplus serve`` would choose.

    Raises:
        CheckpointError: the folder is not a model, a table fails its checksum, or ``target`` exists
            or cannot be written.
        ConfigError: the exported code lacks a feature of the model; the message names the field.
    """
    config, stored = open_checkpoint(source)
    _check_known(config.model)
    if target.exists():
        raise CheckpointError(f"{target}: exists already")
    chosen = serving_dtype(config, stored, dtype or "auto")
    chosen_name = str(chosen).removeprefix("torch.")
    found = read_folder(source, chosen_name if config.has_groups else dtype)
    tables = config.model.table_names
    dense = [one for one in found.sources if one.name not in tables]
    rows = [_floating(one, stored[one.name], chosen) for one in found.sources if one.name in tables]
    described = _described(found.config, chosen_name)
    # lists for our row caches are no weights, but have their suffix
    carried = {name: one for name, one in found.extra_files.items() if name != HOT_ROWS_FILE}
    files = carried | _tokenizer_files(source, config, carried)
    if "auto_map" in described:
        files |= {name: (_CODE / name).read_bytes() for name in _CODE_FILES}
    files["config.json"] = _json(described)
    try:
        with new_folder(target) as folder:
            files |= _write_shards(folder, [dense, *([one] for one in rows)], target.name)
            for name, content in files.items():
                write_synced(folder / name, content)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from None


def _check_known(model: ModelConfig) -> None:
    """Raise ConfigError if a part of the model has a feature that the exported code lacks."""
    parts = {"": model, "memory": model.memory, "mixture": model.mixture}
    for name, part in parts.items():
        for field in fields(part) if part is not None else ():
            if field.name in _KNOWN[name] or getattr(part, field.name) == field.default:
                continue
            path = f"{name}.{field.name}".removeprefix(".")
            raise ConfigError(f"{path}: cannot be exported to transformers")


def _described(config: CheckpointConfig, dtype: str) -> dict[str, Any]:
    """The content of the exported config.json."""
    model, mixture = config.model, config.model.mixture
    kinds = set(model.feed_forward)
    if kinds == {"dense"} or (
        mixture is not None
        and kinds == {"moe"}
        and mixture.expert_size == model.intermediate_size
        and not model.attention_bias
    ):
        raw = config_to_json(config) | {"torch_dtype": config.dtype or dtype}
        return {key: value for key, value in raw.items() if key not in _OWN_KEYS}
    raw = {"architectures": ["MemplusForCausalLM"], "model_type": "memplus"}
    raw["auto_map"] = {
        "AutoConfig": "configuration_memplus.MemplusConfig",
        "AutoModelForCausalLM": "modeling_memplus.MemplusForCausalLM",
    }
    raw |= {key: getattr(model, name) for name, key in _KEYS.items()}
    frequencies = rope_frequencies(model.head_dim, model.rope_theta, model.rope_scaling)
    raw["rope_frequencies"] = frequencies.tolist()
    raw["rope_amplitude"] = rope_amplitude(model.rope_scaling)
    raw["feed_forward"] = list(model.feed_forward)
    raw["memory"] = asdict(model.memory) if model.memory is not None else None
    raw["mixture"] = asdict(mixture) if mixture is not None else None
    raw |= {"bos_token_id": config.bos_id, "eos_token_id": sorted(config.eos_ids) or None}
    return raw | {"torch_dtype": config.dtype or dtype}


def _tokenizer_files(
    source: Path, config: CheckpointConfig, found: Mapping[str, bytes]
) -> dict[str, bytes]:
    """The tokenizer's files that the folder lacks, and its settings.

    transformers needs further packages to read a ``tokenizer.model``, and cannot derive the
    tokenizer's class from our kind of model.
    """
    if not {"tokenizer.json", "tokenizer.model"} & found.keys():
        return {}
    path, tokenizer = source / CONFIG_FILE, load_tokenizer(source)
    settings = read_json_object(path) if path.exists() else {}
    # it may name code of somebody else, which transformers would download and run
    settings.pop("auto_map", None)
    made: dict[str, bytes] = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        settings.setdefault("tokenizer_class", "LlamaTokenizer")
        as_json = sentencepiece_json(tokenizer)
        if as_json is not None:
            made["tokenizer.json"] = as_json.to_str().encode()
            settings["tokenizer_class"] = _JSON_CLASS
    settings.setdefault("tokenizer_class", _JSON_CLASS)
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    ends = {"bos_token": config.bos_id, "eos_token": min(config.eos_ids, default=None)}
    for name, token_id in ends.items():
        if token_id in tokenizer.special_ids and "special_tokens_map.json" not in found:
            settings.setdefault(name, tokenizer.token_text(token_id))
    return made | {CONFIG_FILE: _json(settings)}


def _floating(source: TensorSource, stored: StoredTensor, dtype: torch.dtype) -> TensorSource:
    """A table whose rows are floating; quantised rows become rows of ``dtype``."""
    records = stored_format(stored)
    if records is None:
        return source

    def load() -> Iterator[Tensor]:
        for part in read_parts(stored, verify=has_checksum(stored)):
            yield dequantize_rows(RowRecords(part, *records))

    return TensorSource(source.name, table_shape(stored), dtype, load)


def _write_shards(folder: Path, shards: list[list[TensorSource]], label: str) -> dict[str, bytes]:
    """Write one file per shard; return the index if there are several."""
    names = {
        f"model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }
    if len(shards) == 1:
        names = {"model.safetensors": shards[0]}
    every = [source for shard in shards for source in shard]
    total = sum(one.dtype.itemsize * torch.Size(one.shape).numel() for one in every)
    with tqdm(total=total, unit="B", unit_scale=True, desc=label) as progress:
        for name, shard in names.items():
            write_tensors(folder / name, shard, progress.update)
    if len(shards) == 1:
        return {}
    weight_map = {source.name: name for name, shard in names.items() for source in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {"model.safetensors.index.json": _json(index)}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
