"""Finds the weights of a training run of facebookresearch/memory. Needs no torch."""

from pathlib import Path

WEIGHTS, PARAMS, METADATA = "consolidated.pth", "params.json", ".metadata"


def weights_folder(run: Path) -> Path | None:
    """The folder of a run's last weights: ``run`` itself, ``consolidated``, or that of a step.

    None if this is no run; a folder with ``config.json`` is a checkpoint folder.
    """
    if (run / "config.json").exists():
        return None
    steps = sorted(
        (one for one in run.glob("[0-9]*") if one.name.isascii() and one.name.isdigit()),
        key=lambda one: int(one.name),
    )
    for folder in (run, run / "consolidated", *reversed(steps)):
        if (folder / WEIGHTS).exists() or (folder / METADATA).exists():
            return folder
    return None
