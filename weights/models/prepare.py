"""Prepares a model's checkpoint folder: converts SmolLM2 on first use."""

import fcntl
import shutil
from pathlib import Path

from weights.errors import CheckpointError
from weights.models.named_models import SMOLLM2, model_folder, smollm2_source


def prepared_folder(name: str, cache_folder: Path) -> Path:
    """The checkpoint folder of a name or path; converts SmolLM2 if that was not done yet.

    If several processes call this at once, one converts and the others wait for it.

    Raises:
        CheckpointError: the model does not exist, or the cache folder cannot be written.
    """
    folder = model_folder(name, cache_folder)
    if name != SMOLLM2 or folder.exists():
        return folder
    # imports torch, which is slow and needed only for the conversion
    from weights.checkpoints.convert import convert

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                # left by a killed process: a live one would still hold the lock
                for left in folder.parent.glob(f".{folder.name}.partial-*"):
                    shutil.rmtree(left)
                convert(smollm2_source(), folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be prepared ({error.strerror})") from None
    return folder
