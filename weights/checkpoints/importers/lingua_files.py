"""Where a training run of facebookresearch/memory keeps its weights. Needs no torch."""

from pathlib import Path

WEIGHTS, PARAMS, METADATA = "consolidated.pth", "params.json", ".metadata"


def weights_folder(run: Path) -> Path | None:
    """The folder of a run's last weights: ``run`` itself, ``consolidated``, or that of a step.

    None if this is no run.
    """
    steps = sorted(one for one in run.glob("*") if one.name.isdigit())
    for folder in (run, run / "consolidated", *reversed(steps)):
        if (folder / WEIGHTS).exists() or (folder / METADATA).exists():
            return folder
    return None
