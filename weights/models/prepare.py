"""The folder of a model, made where it is not there yet."""

import fcntl
import shutil
from pathlib import Path

from weights.errors import CheckpointError
from weights.models.named_models import SMOLLM2, model_folder, smollm2_source


def prepared_folder(name: str, cache_folder: Path) -> Path:
    """The checkpoint folder of a name or path; SmolLM2 is converted once.

    Several processes may ask at once: one converts, the others wait for it.

    Raises:
        CheckpointError: there is no such model, or the cache folder cannot be written.
    """
    folder = model_folder(name, cache_folder)
    if name != SMOLLM2 or folder.exists():
        return folder
    # takes a while, and is wanted once
    from weights.checkpoints.convert import convert

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                # who began these was killed, or it would still hold the lock
                for left in folder.parent.glob(f".{folder.name}.partial-*"):
                    shutil.rmtree(left)
                convert(smollm2_source(), folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be prepared ({error.strerror})") from None
    return folder
