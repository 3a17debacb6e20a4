"""Opens files of ``torch.save`` without running what they say: tensors and plain values only."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from weights.errors import CheckpointError

# the pickle names the tensors, a few hundred bytes each; the tensors' bytes are other entries
_MOST_PICKLE_BYTES = 2**26
_MOST_ENTRIES = 2**17


def read_torch_file(path: Path) -> Mapping[str, Any]:
    """The dictionary in a ``.pth`` file, with CPU tensors mapped from it.

    Raises:
        CheckpointError: the file cannot be read, is not of torch's zip format, is compressed, or
            holds other things than dictionaries, lists, numbers, strings and tensors.
    """
    try:
        _check_entries(path)
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise CheckpointError(f"{path}: is not a zip file, as torch.save writes it") from None
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: holds more than tensors: {reason:.200}") from None
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be read: {reason:.200}") from None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: is not a dictionary")
    return found


def _check_entries(path: Path) -> None:
    """Bound what reading the entries can take before torch does it."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if len(entries) > _MOST_ENTRIES:
        raise CheckpointError(f"{path}: has {len(entries)} entries, more than {_MOST_ENTRIES}")
    size = path.stat().st_size
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise CheckpointError(f"{path}: {entry.filename:.100} is compressed")
        if entry.filename.endswith(".pkl") and entry.file_size > _MOST_PICKLE_BYTES:
            raise CheckpointError(
                f"{path}: {entry.filename:.100} has {entry.file_size} bytes, more than"
                f" {_MOST_PICKLE_BYTES}"
            )
