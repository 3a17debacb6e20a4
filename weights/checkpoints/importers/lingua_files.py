"""Finds the weights of a training run of facebookresearch/memory. Needs no torch."""

from collections.abc import Iterator
from pathlib import Path

WEIGHTS, PARAMS, METADATA = "consolidated.pth", "params.json", ".metadata"


def weights_folder(run: Path) -> Path | None:
    """The folder of a run's weights; None if this is no run.

    It is ``run`` itself or its ``consolidated``, or those of the last step that has weights; steps
    may lie in ``checkpoints``. A folder with ``config.json`` is no run.
    """
    if (run / "config.json").exists():
        return None
    for folder in _candidates(run):
        if (folder / WEIGHTS).exists() or (folder / METADATA).exists():
            return folder
    return None


def _candidates(run: Path) -> Iterator[Path]:
    for place in (run, run / "checkpoints"):
        steps = [one for one in place.glob("[0-9]*") if one.name.isascii() and one.name.isdigit()]
        for folder in (place, *sorted(steps, key=lambda one: int(one.name), reverse=True)):
            yield from (folder, folder / "consolidated")
