"""Settings of ``memplus train``: a TOML file, read strictly, with overrides."""

import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import ConfigError
from engine.model.config import MemoryConfig
from weights.checkpoints.config_json import MODEL_KEYS, is_known_key
from weights.checkpoints.config_keys import IGNORED_KEYS, QUANTIZATION_KEY
from weights.nearest_name import suggestion
from weights.toml_file import read_toml, typed_value

Section = TypeVar("Section")

_SLOWEST_NARROW_DECAY = 0.99
# keys of a config.json that say nothing about a model to train
_WITHOUT_EFFECT = {"vocab_size", QUANTIZATION_KEY, *IGNORED_KEYS}


@dataclass(frozen=True)
class DataConfig:
    """Texts, tokenizer and sequence length.

    Attributes:
        train: files and folders; a ``.txt`` file, a ``.jsonl`` line or a parquet row is a document.
        validation: files and folders; if empty, part of the training documents is held out.
        validation_share: fraction of the training documents that is held out; if it is less than
            one document, the end of the longest is held out; 0 holds out none.
        text_key: key of a ``.jsonl`` line, or column of a parquet file, that has the text.
        tokenizer: a ``tokenizer.model`` or checkpoint folder; if empty, a tokenizer is trained.
        vocab_size: tokens of a trained tokenizer.
        sequence_length: tokens per sequence; longer documents become several.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    validation_share: float = 0.01
    text_key: str = "text"
    tokenizer: str = ""
    vocab_size: int = 8192
    sequence_length: int = 256

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train: is empty; must name files or folders")
        for name in ("train", "validation"):
            if "" in getattr(self, name):
                raise ConfigError(f"data.{name}: has an empty path; [] is an empty list")
        _at_least(self, "data", 1, "sequence_length")
        _at_least(self, "data", 260, "vocab_size")  # bytes, and marks of begin and end
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"data.validation_share: {self.validation_share} is outside [0, 1)")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for dense weights, sparse Adam for tables; norms, biases and tables do not decay.

    Attributes:
        lr: peak learning rate of dense weights.
        table_lr: peak learning rate of tables (arXiv 2412.09764 uses 1e-3).
        beta1: decay of the first moments.
        beta2: decay of the second moments.
        eps: added to the denominator of a step.
        weight_decay: decoupled weight decay of dense matrices.
        clip_norm: largest norm of all gradients together, tables included; 0 disables clipping.
        row_wise: keep one moment per table row instead of two per value.
        moment_dtype: dtype of a table's two moments per value; bfloat16 halves their memory.
        warmup_steps: steps in which the learning rates rise from 0 to their peak; a tenth of the
            run's steps if it has no more than these.
        decay: shape of the decay after the warm-up.
        least_lr_share: final learning rates as a fraction of the peak.
    """

    lr: float = 1e-3
    table_lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    row_wise: bool = False
    moment_dtype: str = field(default="float32", metadata={"choices": ("float32", "bfloat16")})
    warmup_steps: int = 100
    decay: str = field(default="cosine", metadata={"choices": ("cosine", "linear", "constant")})
    least_lr_share: float = 0.1

    def __post_init__(self) -> None:
        _at_least(self, "optimizer", 0, "lr", "table_lr", "weight_decay", "clip_norm")
        _at_least(self, "optimizer", 0, "warmup_steps", "least_lr_share")
        _at_least(self, "optimizer", 1e-15, "eps")
        if self.least_lr_share > 1:
            raise ConfigError(
                f"optimizer.least_lr_share: must be at most 1, not {self.least_lr_share}"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}: {getattr(self, name)} is outside [0, 1)")
        if self.moment_dtype == "bfloat16":
            self._check_narrow_moments()

    def _check_narrow_moments(self) -> None:
        if self.row_wise:
            raise ConfigError(
                "optimizer.moment_dtype: bfloat16 is for two moments per value; with row_wise,"
                " moments are float32"
            )
        for name in ("beta1", "beta2"):
            # a bfloat16 number keeps changes of 1/256 or more: a slower decay would be rounded away
            if getattr(self, name) > _SLOWEST_NARROW_DECAY:
                raise ConfigError(
                    f"optimizer.{name}: must be at most {_SLOWEST_NARROW_DECAY} with bfloat16"
                    f" moments, not {getattr(self, name)}"
                )


@dataclass(frozen=True)
class RunConfig:
    """Length, batch size, precision, checkpoints and seed of a run.

    Attributes:
        steps: number of optimiser steps; a change on resume keeps the learning rates' schedule.
        tokens_per_step: tokens of a step, over all its passes.
        passes_per_step: forward and backward passes per step; more passes take less memory.
        device: device to train on; several processes on one machine use one CUDA device each.
        table_tier: home of tables and their moments: ``device``, or ``host`` for page-locked memory
            of the host, which only ``cuda`` can train from.
        table_sharding: division of tables and their moments among several processes: ``none``, so
            that each holds all of them, by ``rows`` or by ``columns``.
        dtype: dtype of matrix products; weights, scores, norms and the loss are float32.
        checkpoint_activations: recompute each layer in the backward pass to save memory.
        compile: compile norms and dense feed-forwards by torch.compile, in the first step.
        checkpoint_every: steps between checkpoints, of which the two newest are kept.
        evaluate_every: steps between evaluations on held-out documents.
        seed: seed of initial weights and of the order of documents.
        init_from: name, folder or ORG/NAME[@REVISION] of the Hugging Face Hub of a model to start
            from; it may lack memory layers.
        freeze: ``dense``: only memory layers and their tables are trained.
    """

    steps: int
    tokens_per_step: int = 8192
    passes_per_step: int = 1
    device: str = field(default="cpu", metadata={"choices": ("cpu", "cuda")})
    table_tier: str = field(default="device", metadata={"choices": ("device", "host")})
    table_sharding: str = field(default="none", metadata={"choices": ("none", "rows", "columns")})
    dtype: str = field(default="bfloat16", metadata={"choices": ("bfloat16", "float32")})
    checkpoint_activations: bool = False
    compile: bool = False
    checkpoint_every: int = 500
    evaluate_every: int = 500
    seed: int = 0
    init_from: str = ""
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _at_least(self, "run", 1, "steps", "tokens_per_step", "passes_per_step")
        _at_least(self, "run", 1, "checkpoint_every", "evaluate_every")
        _at_least(self, "run", 0, "seed")
        for part in self.freeze:
            if part != "dense":
                raise ConfigError(f"run.freeze: {part!r} is not supported; must be 'dense'")
        if self.table_sharding != "none" and self.table_tier == "host":
            raise ConfigError(
                f"run.table_sharding: {self.table_sharding} is not possible with run.table_tier"
                " host; use device"
            )
        if self.tokens_per_step % self.passes_per_step:
            raise ConfigError(
                f"run.passes_per_step: {self.passes_per_step} does not divide tokens_per_step"
                f" {self.tokens_per_step}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """All sections. ``model`` has the keys of a ``config.json`` except ``vocab_size``.

    With ``run.init_from``, ``model`` has only the keys that differ from that folder's config.
    """

    data: DataConfig
    run: RunConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    model: Mapping[str, Any] = field(default_factory=dict)


def read_train_config(path: Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file; ``changes`` are ``section.key=value``, the value as TOML or plain text.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or has an invalid value;
            the message names it.
    """
    raw = read_toml(path)
    for change in changes:
        _set(raw, change)
    known = {one.name: one for one in fields(TrainConfig)}
    for name, section in raw.items():
        if name not in known:
            near = suggestion(name, known)
            raise ConfigError(f"{name}: unknown section, not {', '.join(known)}{near}")
        if not isinstance(section, dict):
            raise ConfigError(f"{name}: expected a section, got {section!r}")
    check_model_keys(raw.get("model", {}))
    return TrainConfig(
        data=_section(DataConfig, "data", raw),
        run=_section(RunConfig, "run", raw),
        optimizer=_section(OptimizerConfig, "optimizer", raw),
        model=raw.get("model", {}),
    )


def _set(raw: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    *path, key = name.strip().split(".")
    if not equals or not path or not all((*path, key)):
        raise ConfigError(f"set: expected section.key=value, got {change!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    at = raw
    for part in path:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise ConfigError(f"set: {name.strip()}: {part} is not a section")
    at[key] = value


def _section(kind: type[Section], name: str, raw: Mapping[str, Any]) -> Section:
    given, hints = raw.get(name, {}), typing.get_type_hints(kind)
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            near = suggestion(f"{name}.{key}", _known_keys())
            raise ConfigError(f"{name}.{key}: unknown key{near}")
    for key, one in known.items():
        if one.default is MISSING and one.default_factory is MISSING and key not in given:
            raise ConfigError(f"{name}.{key}: missing")
    values = {
        key: typed_value(f"{name}.{key}", value, hints[key], known[key].metadata.get("choices"))
        for key, value in given.items()
    }
    return kind(**values)


def check_model_keys(given: Mapping[str, Any]) -> None:
    """Check the names of keys of the ``model`` section.

    Raises:
        ConfigError: a key is unknown, or is one of a ``config.json`` that training ignores.
    """
    for key in given:
        if key in _WITHOUT_EFFECT:
            known = [*_known_keys(), *(f"model.memory.{one.name}" for one in fields(MemoryConfig))]
            near = suggestion(f"model.{key}", known, is_typing_error=False) or "; remove it"
            raise ConfigError(f"model.{key}: has no effect on training{near}")
        if not is_known_key(key):
            near = suggestion(f"model.{key}", _known_keys())
            raise ConfigError(f"model.{key}: unknown key{near}")


def _known_keys() -> list[str]:
    sections = {"data": DataConfig, "run": RunConfig, "optimizer": OptimizerConfig}
    keys = [f"{name}.{one.name}" for name, kind in sections.items() for one in fields(kind)]
    # the vocabulary's size follows from the tokenizer
    return [*keys, *(f"model.{key}" for key in MODEL_KEYS - {"vocab_size"})]


def _at_least(section: object, name: str, least: float, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        if not value >= least:
            raise ConfigError(f"{name}.{key}: must be at least {least}, not {value}")
