"""Settings of the learning loop and of the rows that it may change."""

import math
from dataclasses import dataclass, field, fields

from engine.errors import ConfigError

_GIVEN_TOKENS, _GENERATED_TOKENS = 2**18, 2**15
_KL_WEIGHT = 1.0
_ROWS = 16_384
RANKS = ("tfidf", "reads", "all")
_LR = {"adam": 0.006, "sgd": 30.0}


@dataclass(frozen=True)
class LearningConfig:
    """The learning loop: its length, its batches and what keeps a model from forgetting.

    The learning rate rises over the warm-up, stays constant until all answers are exact, and falls
    linearly to 0 over the cool-down.

    Raises:
        ConfigError: a field is out of range.
    """

    steps: int = field(
        default=300,
        metadata={
            "group": ("learning", "--steps 800 --replay-share 0.5 --seed 1"),
            "help": "maximum number of optimiser steps, cool-down included",
        },
    )
    warmup_steps: int = field(
        default=10, metadata={"help": "steps in which the learning rate rises from 0"}
    )
    cooldown_steps: int = field(
        default=100,
        metadata={"help": "steps in which the learning rate falls to 0, once answers are exact"},
    )
    batch_tokens: int = field(default=2048, metadata={"help": "tokens of a step, replay included"})
    replay_share: float = field(
        default=0.75,
        metadata={
            "help": "fraction of a step's tokens taken from background text (0 disables replay)"
        },
    )
    background_tokens: int | None = field(
        default=None,
        metadata={
            "help": "maximum number of tokens that are read from --background, from its start"
            f" (default: {_GIVEN_TOKENS}). Without --background: tokens that the model writes"
            f" (default: {_GENERATED_TOKENS})"
        },
    )
    divergence_weight: float | None = field(
        default=None,
        metadata={
            "help": "weight of KL(unpatched model || patched model) on replayed text, in the loss"
            f" (default: {_KL_WEIGHT:g}); 0 replays with the cross entropy of the text instead"
        },
    )
    precision: str = field(
        default="float32",
        metadata={
            "choices": ("float32", "bfloat16"),
            "help": "dtype of matrix products while learning",
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of the order of facts and replayed text"})
    save_every: int = field(
        default=50,
        metadata={"help": "save the state every this many steps, for --resume", "metavar": "STEPS"},
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("steps", "batch_tokens", "save_every"):
            _at_least(self, name, 1)
        if self.background_tokens is not None:
            _at_least(self, "background_tokens", 1)
        if self.divergence_weight is not None:
            _at_least(self, "divergence_weight", 0)
        for name in ("warmup_steps", "cooldown_steps", "seed"):
            _at_least(self, name, 0)
        if not 0 <= self.replay_share < 1:
            raise ConfigError(f"replay_share: {self.replay_share} is outside [0, 1)")
        if self.divergence_weight is not None and not self.replay_share:
            raise ConfigError("divergence_weight: has no effect with a replay_share of 0")
        if self.warmup_steps + self.cooldown_steps >= self.steps:
            raise ConfigError(
                f"steps: must be more than warmup_steps + cooldown_steps"
                f" ({self.warmup_steps + self.cooldown_steps}), not {self.steps}"
            )

    def most_background_tokens(self, *, is_given: bool) -> int:
        """``background_tokens``, or the default for given or for generated text."""
        default = _GIVEN_TOKENS if is_given else _GENERATED_TOKENS
        return default if self.background_tokens is None else self.background_tokens

    @property
    def kl_weight(self) -> float:
        """``divergence_weight``, or the default."""
        return _KL_WEIGHT if self.divergence_weight is None else self.divergence_weight

    @property
    def replayed_tokens(self) -> int:
        """Most background tokens of a step; 0 disables replay."""
        return math.ceil(self.replay_share * self.batch_tokens)


@dataclass(frozen=True)
class RowConfig:
    """The rows that may change, and their optimiser.

    Raises:
        ConfigError: a field is out of range.
    """

    rows: int | None = field(
        default=None,
        metadata={
            "group": ("rows", "--rows 4096 --lr 0.002"),
            "help": f"maximum number of rows of each table that may change (default: {_ROWS});"
            " not with --rank all",
        },
    )
    rank: str = field(
        default="tfidf",
        metadata={
            "choices": RANKS,
            "help": "which rows may change: tfidf: those that facts read much more than background"
            " text does; reads: those that facts read most; all: every row",
        },
    )
    optimizer: str = field(
        default="adam", metadata={"choices": ("adam", "sgd"), "help": "optimiser of the rows"}
    )
    lr: float | None = field(
        default=None,
        metadata={
            "help": f"peak learning rate (default: adam {_LR['adam']:g}, sgd {_LR['sgd']:g})"
        },
    )
    clip_norm: float = field(
        default=0.5,
        metadata={
            "help": "largest norm of the gradients of all rows together (0 disables clipping)"
        },
    )
    delta_dtype: str = field(
        default="bfloat16",
        metadata={"choices": ("bfloat16", "float32"), "help": "dtype of the patch's deltas"},
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.rows is not None:
            _at_least(self, "rows", 1)
        _at_least(self, "clip_norm", 0)
        if self.rank == "all" and self.rows is not None:
            raise ConfigError("rows: has no effect with rank all, which lets every row change")
        if not 0 < self.peak_lr < float("inf"):
            raise ConfigError(f"lr: must be above 0 and finite, not {self.lr}")

    @property
    def most_rows(self) -> int:
        """``rows``, or the default."""
        return _ROWS if self.rows is None else self.rows

    @property
    def peak_lr(self) -> float:
        """The peak learning rate: ``lr``, or the optimiser's default."""
        return _LR[self.optimizer] if self.lr is None else self.lr


def _at_least(config: object, name: str, least: float) -> None:
    value = getattr(config, name)
    if not least <= value < float("inf"):
        raise ConfigError(f"{name}: must be at least {least} and finite, not {value}")


def _check_choices(config: "LearningConfig | RowConfig") -> None:
    for one in fields(config):
        choices, value = one.metadata.get("choices"), getattr(config, one.name)
        if choices and value not in choices:
            raise ConfigError(f"{one.name}: must be one of {', '.join(choices)}, not {value!r}")
