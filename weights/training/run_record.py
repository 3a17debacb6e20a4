"""Saved settings of a run: a run resumes only with the settings that it started with."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.new_folder import replace_file
from weights.checkpoints.weights_hash import weights_hash
from weights.errors import CheckpointError, TrainingError
from weights.training.data_source import changed_texts, has_same_sources
from weights.training.run_folder import DATA, SETTINGS
from weights.training.train_config import TrainConfig

# settings that may change on resume: length, intervals, and where and how steps are computed
_CHANGEABLE = (
    *("run.steps", "run.checkpoint_every", "run.evaluate_every"),
    *("run.checkpoint_activations", "run.device", "run.table_tier", "run.table_sharding"),
)
# paths that may change if the files there are the same
_INIT_FROM = "run.init_from"
_SOURCES = ("data.train", "data.validation", "data.tokenizer", _INIT_FROM)
# hash of the weights that the run started from, next to the settings
_WEIGHTS = "init_from_weights"

# settings that earlier versions lack, with the values that their runs had
_NEWER: Mapping[str, Any] = {
    "run.freeze": [],
    "data.text_key": "text",
    "run.compile": False,
    "run.table_tier": "device",
    "run.table_sharding": "none",
    "optimizer.moment_dtype": "float32",
}
_MOST_NAMED = 3


@dataclass(frozen=True)
class SavedSettings:
    """The settings of a run to resume.

    Attributes:
        schedule_steps: ``run.steps`` when the run began.
        changes: lines about settings and texts that differ.
    """

    schedule_steps: int
    changes: tuple[str, ...]


def save_settings(folder: Path, config: TrainConfig) -> None:
    """Save the settings of a run without a checkpoint; replaces those of an earlier attempt.

    Raises:
        TrainingError: the file cannot be written.
        CheckpointError: the model that the run starts from cannot be read.
    """
    path, settings = folder / SETTINGS, asdict(config)
    if config.run.init_from:
        settings[_WEIGHTS] = _hash(config.run.init_from)
    try:
        replace_file(path, f"{json.dumps(settings, indent=2)}\n".encode())
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from None


def resumed_settings(folder: Path, config: TrainConfig) -> SavedSettings:
    """Compare the settings with those of the run in a folder.

    Raises:
        TrainingError: a setting differs with which the run would not be the same; the message
            names it.
    """
    before = _saved(folder)
    weights = before.pop(_WEIGHTS, None)
    now = dict(_leaves(json.loads(json.dumps(asdict(config)))))
    before = {**_NEWER, **before}  # a run of an earlier version lacks newer settings
    changes = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        is_same = name != _INIT_FROM or _has_weights(config.run.init_from, weights)
        if (
            name in _SOURCES
            and is_same
            and has_same_sources(folder / DATA, config.data, config.run.init_from)
        ):
            continue
        if name not in _CHANGEABLE:
            raise TrainingError(
                f"{name}: must be {old!r} to resume {folder}, not {new!r};"
                f" use another folder for a new run"
            )
        changes.append(f"{name}: was {old!r} when the run began, now {new!r}")
    return SavedSettings(before["run.steps"], (*changes, *_text_changes(folder)))


def saved_init_from(folder: Path) -> str:
    """``run.init_from`` of the run in a folder (TrainingError)."""
    return str(_saved(folder)[_INIT_FROM])


def _hash(init_from: str) -> str:
    return weights_hash(open_checkpoint(Path(init_from))[1].values())


def _has_weights(init_from: str, wanted: str | None) -> bool:
    """Whether a model has the weights of this hash; None is that of a run without a record."""
    if not init_from or wanted is None:
        return False
    try:
        return _hash(init_from) == wanted
    except CheckpointError:
        return False


def _saved(folder: Path) -> dict[str, Any]:
    """The saved settings by their whole names."""
    path = folder / SETTINGS
    try:
        saved = dict(_leaves(json.loads(path.read_text(encoding="utf-8"))))
        if isinstance(saved["run.steps"], int) and isinstance(saved[_INIT_FROM], str):
            return saved
        raise ValueError("its values have wrong types")
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise TrainingError(f"{path}: is not valid ({error})") from None


def _text_changes(folder: Path) -> Iterator[str]:
    changed = changed_texts(folder / DATA)
    if changed:
        shown = ", ".join(changed[:_MOST_NAMED])
        more = f" and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
        yield f"{shown}{more}: changed or gone; the run keeps the tokens that it began with"


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value
