"""Prepares a model's checkpoint folder: converts files and links adapters on first use."""

import fcntl
import logging
import shutil
from pathlib import Path

from weights.errors import CheckpointError
from weights.models.adapted_model import find_served, present_version
from weights.models.folder_lock import hold, remove_unheld
from weights.models.named_models import ModelFolder

logger = logging.getLogger(__name__)


def prepared_folder(name: str, cache_folder: Path, adapter: str | None = None) -> Path:
    """The checkpoint folder of a name or path, maybe with a memory adapter, after ``prepare``.

    Raises:
        CheckpointError, ConfigError: as ``find_served`` and ``prepare``.
    """
    return prepare(find_served(name, adapter, cache_folder))


def prepare(model: ModelFolder) -> Path:
    """The checkpoint folder of a model; makes it from its source if that was not done yet.

    If several processes call this at once, one converts and the others wait for it. The process
    holds a converted folder, or a checkpoint of a run, until it ends. A conversion replaces those
    of older versions of the same source, except the ones that a process holds.

    Raises:
        CheckpointError: the source is not valid or has changed since it was found, or the cache
            folder cannot be written.
        ConfigError: the base of a memory adapter has memory layers.
    """
    folder = model.folder
    if model.is_of_run:
        hold(folder)
    if model.base is not None and model.source is not None:
        prepare(model.base)
        # the folder has links: its files are not those that were compared if they have changed
        if present_version(model.base, model.source) != model.version:
            raise CheckpointError(f"{model.source}: it or its base changed since it was found")
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
    # they import torch, which is slow and needed only for the conversion
    from weights.adapters.memory_adapter import link_adapter
    from weights.checkpoints.convert import convert

    folder = model.folder
    for left in folder.parent.glob(".*.partial-*"):
        # left by a killed process: a live one would still hold the lock
        if model.is_version(left.name[1:].rpartition(".partial-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    if model.base is not None:
        link_adapter(model.base.folder, source, folder)
    else:
        convert(source, folder, model.dtype, source_version=model.version)
    for other in folder.parent.iterdir():
        if other != folder and other.is_dir() and model.is_version(other.name):
            try:
                remove_unheld(other)
            except OSError as error:
                logger.warning("%s: cannot be removed (%s)", other, error.strerror)
