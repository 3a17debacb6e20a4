"""What a run was told when it began: it goes on with the same, or not at all."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weights.errors import TrainingError
from weights.training.train_config import TrainConfig

# what may be another when a run goes on: how long it lasts, and what is kept of it
_FREE = (
    *("run.steps", "run.checkpoint_every", "run.evaluate_every"),
    *("run.checkpoint_activations", "run.device"),
)


def check_record(folder: Path, config: TrainConfig) -> None:
    """Write the record, or compare it with the one that is there.

    Raises:
        TrainingError: another setting would be ignored, or mix two runs; the message names it.
    """
    path = folder / "settings.json"
    now = json.loads(json.dumps(asdict(config)))
    try:
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
            partial.rename(path)
            return
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: {error}") from None
    had, has = dict(_leaves(before)), dict(_leaves(now))
    for name in sorted(had.keys() | has.keys()):
        if name not in _FREE and had.get(name) != has.get(name):
            raise TrainingError(
                f"{name}: this run began with {had.get(name)!r}, not {has.get(name)!r}; another run"
                f" takes another folder than {folder}"
            )


def _leaves(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value
