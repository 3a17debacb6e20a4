"""Prepares a model's checkpoint folder: converts SmolLM2 and GGUF files on first use."""

import fcntl
import logging
import shutil
from pathlib import Path

from weights.errors import CheckpointError
from weights.models.folder_lock import hold, remove_unheld
from weights.models.named_models import ModelFolder, find_model

logger = logging.getLogger(__name__)


def prepared_folder(name: str, cache_folder: Path) -> Path:
    """The checkpoint folder of a name or path, after ``prepare``.

    Raises:
        CheckpointError: as ``find_model`` and ``prepare``.
    """
    return prepare(find_model(name, cache_folder))


def prepare(model: ModelFolder) -> Path:
    """The checkpoint folder of a model; converts its GGUF file if that was not done yet.

    If several processes call this at once, one converts and the others wait for it. The process
    holds a converted folder until it ends. A conversion replaces those of older versions of the
    same file, except the ones that a process holds.

    Raises:
        CheckpointError: the source is not valid or has changed since it was found, or the cache
            folder cannot be written.
    """
    folder = model.folder
    try:
        if model.source is not None and hold(folder) is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open(folder.parent / f"{model.family}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if hold(folder) is None:
                    _convert(model, model.source)
                    hold(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be prepared ({error.strerror})") from None
    return folder


def _convert(model: ModelFolder, source: Path) -> None:
    """Write the folder and remove other versions; the caller holds the lock of all versions."""
    # imports torch, which is slow and needed only for the conversion
    from weights.checkpoints.convert import convert

    folder = model.folder
    for left in folder.parent.glob(".*.partial-*"):
        # left by a killed process: a live one would still hold the lock
        if model.is_version(left.name[1:].rpartition(".partial-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    convert(source, folder, model.dtype, source_version=model.version)
    for other in folder.parent.iterdir():
        if other != folder and other.is_dir() and model.is_version(other.name):
            try:
                remove_unheld(other)
            except OSError as error:
                logger.warning("%s: cannot be removed (%s)", other, error.strerror)
