"""A model with a memory adapter, as a folder of links in the cache folder. Needs no torch."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from weights.adapters.adapter_files import DESCRIPTION, files_version
from weights.errors import ModelNotFoundError
from weights.models.named_models import ModelFolder, find_model

_LONGEST_NAME = 40
# change it with the links, so that an old folder is never mistaken for a new one
_LINKING = 1


def find_served(name: str, adapter: str | None, cache_folder: Path) -> ModelFolder:
    """As ``find_model``; with the folder of a memory adapter, the model with these memories.

    Raises:
        ModelNotFoundError: as ``find_model``, or ``adapter`` is not the folder of an adapter.
        CheckpointError: as ``find_model``, or the adapter cannot be read.
    """
    base = find_model(name, cache_folder)
    if adapter is None:
        return base
    try:
        folder = Path(adapter).expanduser()
        has_description = (folder / DESCRIPTION).is_file()
    except (OSError, RuntimeError) as error:  # the latter for an unknown user's home
        raise ModelNotFoundError(f"memory_adapter: {adapter:.200}: {error}") from None
    if not has_description:
        raise ModelNotFoundError(f"memory_adapter: {adapter} has no {DESCRIPTION}")
    version = present_version(base, folder)
    paths = f"{os.path.abspath(folder)}\n{_place(base)}"
    place = hashlib.sha256(paths.encode(errors="surrogateescape")).hexdigest()[:8]
    linked = f"{folder.name[:_LONGEST_NAME]}-{place}-{_LINKING}.{version}"
    return replace(
        base,
        folder=cache_folder / "models" / linked,
        source=folder,
        version=version,
        dtype=None,
        base=base,
    )


def present_version(base: ModelFolder, adapter: Path) -> str:
    """A hash that changes with the files of an adapter and of its base.

    Raises:
        CheckpointError: a folder cannot be read.
    """
    if _is_converted(base):
        # its folder has another name when its file has changed
        converted = hashlib.sha256(base.folder.name.encode(errors="surrogateescape")).hexdigest()
        return f"{files_version([adapter])[:8]}{converted[:8]}"
    return files_version([adapter, base.folder])


def _is_converted(base: ModelFolder) -> bool:
    return base.version is not None or base.dtype is not None


def _place(base: ModelFolder) -> str:
    """What stays the same when the base's files change."""
    if base.repository is not None:
        return base.repository
    return os.path.abspath(base.source or base.folder if base.version else base.folder)
