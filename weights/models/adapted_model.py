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
    folder = Path(adapter).expanduser()
    if not (folder / DESCRIPTION).is_file():
        raise ModelNotFoundError(f"memory_adapter: {adapter} has no {DESCRIPTION}")
    # a converted model has a folder of another name when its file has changed
    is_converted = base.folder.parent == cache_folder / "models"
    version = files_version([folder] if is_converted else [folder, base.folder])
    paths = f"{os.path.abspath(folder)}\n{os.path.abspath(base.folder)}"
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
