"""Saved settings of a run: a run resumes only with the settings that it started with."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weights.errors import TrainingError
from weights.training.train_config import TrainConfig

# settings that may change on resume: length, intervals, and where and how steps are computed
_CHANGEABLE = (
    *("run.steps", "run.checkpoint_every", "run.evaluate_every"),
    *("run.checkpoint_activations", "run.device", "run.table_tier"),
)

# settings that earlier versions lack, with the values that their runs had
_NEWER: Mapping[str, Any] = {
    "run.freeze": [],
    "run.compile": False,
    "optimizer.moment_dtype": "float32",
}


def check_settings(folder: Path, config: TrainConfig, *, has_begun: bool) -> None:
    """Save the settings, or compare them with the saved ones if the run ``has_begun``.

    A run begins with its first checkpoint: what failed before that binds nobody.

    Raises:
        TrainingError: a setting differs from the saved one; the message names it.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(asdict(config)))
    try:
        if not has_begun or not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            partial.rename(path)
            return
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: {error}") from None
    # a run of an earlier version lacks newer settings
    saved, now = {**_NEWER, **dict(_leaves(before))}, dict(_leaves(settings))
    for name in sorted(saved.keys() | now.keys()):
        if name not in _CHANGEABLE and saved.get(name) != now.get(name):
            raise TrainingError(
                f"{name}: must be {saved.get(name)!r} to resume {folder}, not {now.get(name)!r};"
                f" use another folder for a new run"
            )


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value
