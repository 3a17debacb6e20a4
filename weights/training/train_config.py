"""What ``memplus train`` is told: a TOML file, read strictly, and changes from the command line."""

import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import ConfigError

Section = TypeVar("Section")


@dataclass(frozen=True)
class DataConfig:
    """Where texts come from, and how they become sequences.

    Attributes:
        train: files and folders; a ``.txt`` is a document, a line of a ``.jsonl`` another.
        validation: likewise; without it some of the training documents are held out.
        validation_share: how many of them, whole documents.
        tokenizer: a ``tokenizer.model`` or checkpoint folder; without it one is trained.
        vocab_size: of a tokenizer that is trained.
        sequence_length: tokens that attention spans; longer documents are cut.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    validation_share: float = 0.01
    tokenizer: str = ""
    vocab_size: int = 8192
    sequence_length: int = 256

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train: names no file or folder")
        _at_least(self, "data", 1, "sequence_length")
        _at_least(self, "data", 300, "vocab_size")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"data.validation_share: {self.validation_share} is outside [0, 1)")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for dense weights, sparse Adam for tables; norms, biases and tables do not decay.

    Attributes:
        lr: the highest, of dense weights.
        table_lr: the highest, of tables (arXiv 2412.09764 uses 1e-3).
        beta1: of both.
        beta2: of both.
        eps: of both.
        weight_decay: of dense matrices.
        clip_norm: of all gradients together, rows' included; 0 clips none.
        row_wise: tables keep one moment a row instead of two a value.
        warmup_steps: in which learning rates rise from 0.
        decay: their course from there on.
        least_lr_share: of the highest, where that course ends.
    """

    lr: float = 1e-3
    table_lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    row_wise: bool = False
    warmup_steps: int = 100
    decay: str = field(default="cosine", metadata={"choices": ("cosine", "linear", "constant")})
    least_lr_share: float = 0.1

    def __post_init__(self) -> None:
        _at_least(self, "optimizer", 0, "lr", "table_lr", "weight_decay", "clip_norm")
        _at_least(self, "optimizer", 0, "warmup_steps", "least_lr_share")
        _at_least(self, "optimizer", 1e-15, "eps")
        if self.least_lr_share > 1:
            raise ConfigError(f"optimizer.least_lr_share: {self.least_lr_share} is more than 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}: {getattr(self, name)} is outside [0, 1)")


@dataclass(frozen=True)
class RunConfig:
    """How long, how much at once, in which precision, and what is kept.

    Attributes:
        steps: of the optimiser.
        tokens_per_step: of all its passes together.
        passes_per_step: that a step's tokens are cut into, to take less memory.
        device: that trains; several processes of one machine take a CUDA device each.
        dtype: of products; weights, scores, norms and the loss are float32.
        checkpoint_activations: compute each layer's anew backwards instead of keeping them.
        checkpoint_every: steps.
        evaluate_every: steps.
        seed: of weights, and of the order of documents.
        init_from: a model's name or folder to go on from; memory layers that it lacks are new.
    """

    steps: int
    tokens_per_step: int = 8192
    passes_per_step: int = 1
    device: str = field(default="cpu", metadata={"choices": ("cpu", "cuda")})
    dtype: str = field(default="bfloat16", metadata={"choices": ("bfloat16", "float32")})
    checkpoint_activations: bool = False
    checkpoint_every: int = 500
    evaluate_every: int = 500
    seed: int = 0
    init_from: str = ""

    def __post_init__(self) -> None:
        _at_least(self, "run", 1, "steps", "tokens_per_step", "passes_per_step")
        _at_least(self, "run", 1, "checkpoint_every", "evaluate_every")
        _at_least(self, "run", 0, "seed")
        if self.tokens_per_step % self.passes_per_step:
            raise ConfigError(
                f"run.passes_per_step: {self.passes_per_step} does not divide tokens_per_step"
                f" {self.tokens_per_step}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """All sections. ``model`` has the keys of a ``config.json``, its vocabulary's size apart.

    With ``run.init_from`` only the keys that differ from that folder's are given.
    """

    data: DataConfig
    run: RunConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    model: Mapping[str, Any] = field(default_factory=dict)


def read_train_config(path: Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file; ``changes`` are ``section.key=value``, the value as TOML or plain text.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or of a wrong type or
            value; the message names it.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    for change in changes:
        _set(raw, change)
    known = {one.name: one for one in fields(TrainConfig)}
    for name, section in raw.items():
        if name not in known:
            raise ConfigError(f"{name}: unknown section; there are {', '.join(known)}")
        if not isinstance(section, dict):
            raise ConfigError(f"{name}: expected a section")
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
            raise ConfigError(f"set: {name.strip()} goes through {part}, which is no section")
    at[key] = value


def _section(kind: type[Section], name: str, raw: Mapping[str, Any]) -> Section:
    given, hints = raw.get(name, {}), typing.get_type_hints(kind)
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise ConfigError(f"{name}.{key}: unknown key")
    for key, one in known.items():
        if one.default is MISSING and one.default_factory is MISSING and key not in given:
            raise ConfigError(f"{name}.{key}: missing")
    values = {key: _typed(f"{name}.{key}", value, hints[key]) for key, value in given.items()}
    for key, value in values.items():
        choices = known[key].metadata.get("choices")
        if choices and value not in choices:
            raise ConfigError(f"{name}.{key}: {value!r} is not one of {', '.join(choices)}")
    return kind(**values)


def _typed(name: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.GenericAlias):
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{name}: expected a list of texts, got {value!r}")
        return tuple(texts)
    is_number = hint is float and isinstance(value, int)
    if not (isinstance(value, hint) or is_number) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name}: expected {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{name}: {value} is no number to go by")
    return hint(value)


def _at_least(section: object, name: str, least: float, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        if not value >= least:
            raise ConfigError(f"{name}.{key}: must be at least {least}, not {value}")
