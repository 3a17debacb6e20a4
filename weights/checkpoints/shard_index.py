"""The index of a model in several safetensors files: model.safetensors.index.json."""

import json
from pathlib import Path

from weights.errors import CheckpointError
from weights.text_files import ENCODING, regular_file_bytes, unique_keys

INDEX_FILE = "model.safetensors.index.json"
_MAX_BYTES = 2**24
_SUFFIX = ".safetensors"


def read_weight_map(index: Path) -> dict[str, str]:
    """Names of files by names of tensors; not checked against the files.

    Raises:
        CheckpointError: the index cannot be read, has more than 16 MiB, or is not JSON of its form.
    """
    regular_file_bytes(index, _MAX_BYTES)
    try:
        content = json.loads(index.read_text(encoding=ENCODING), object_pairs_hook=unique_keys)
        weight_map = content["weight_map"]
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("not names of files by names of tensors")
    except OSError as error:
        raise CheckpointError(f"{index}: {error.strerror}") from None
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: has no valid weight_map ({error!s:.200})") from None
    return dict(weight_map)


def shard_file(index: Path, name: str) -> Path:
    """A file that an index names; it may be a link, as in Hugging Face's cache.

    Raises:
        CheckpointError: it is not a safetensors file in the folder of the index.
    """
    file = index.parent / name
    try:
        is_valid = Path(name).name == name and file.suffix == _SUFFIX and file.is_file()
    except OSError:  # the name is too long
        is_valid = False
    if not is_valid:
        raise CheckpointError(
            f"{index}: names {name[:80]!r}, which is not a {_SUFFIX} file in its folder"
        )
    return file
