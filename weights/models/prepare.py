"""Prepares a model's checkpoint folder: converts SmolLM2 and GGUF files on first use."""

import fcntl
import glob
import shutil
from pathlib import Path

from weights.errors import CheckpointError
from weights.models.named_models import SMOLLM2, gguf_source, model_folder


def prepared_folder(name: str, cache_folder: Path) -> Path:
    """The checkpoint folder of a name or path; converts a GGUF file if that was not done yet.

    A file's quantised weights stay in 8 or 4 bits; those of SmolLM2 become bfloat16.

    If several processes call this at once, one converts and the others wait for it.

    Raises:
        CheckpointError: the model does not exist, or the cache folder cannot be written.
    """
    folder = model_folder(name, cache_folder)
    source = None if folder.exists() else gguf_source(name)
    if source is None:
        return folder
    # imports torch, which is slow and needed only for the conversion
    from weights.checkpoints.convert import convert

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f"{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                # left by a killed process: a live one would still hold the lock
                for left in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
                    shutil.rmtree(left)
                convert(source, folder, "bfloat16" if name == SMOLLM2 else None)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be prepared ({error.strerror})") from None
    return folder
