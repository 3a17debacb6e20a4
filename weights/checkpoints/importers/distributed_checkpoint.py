"""Reads folders of torch.distributed.checkpoint: shards in files that ``.metadata`` lists.

The list is a pickle. Of the classes in it, a handful is known and replaced by plain records; all
others are refused, and nothing is run.
"""

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from weights.checkpoints.importers.lingua_files import METADATA
from weights.checkpoints.importers.sharded_tensor import ShardedTensor
from weights.checkpoints.importers.stored_slice import read_slice
from weights.checkpoints.tensor_files import STORED_DTYPES, read_mapped
from weights.errors import CheckpointError

_MOST_METADATA_BYTES = 2**28
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "Path", "PurePosixPath"},
    "torch": {
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"),
        *("uint8", "bool", "contiguous_format", "strided"),
    },
}


class _Record:
    """Stands for any object of the list: its arguments and its state."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = arguments

    def __call__(self, *arguments: Any) -> "_Record":
        return _Record(*arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """A field of the object."""
        return self.state[name]


def read_shards(folder: Path, prefix: str) -> dict[str, ShardedTensor]:
    """The float tensors whose names begin with ``prefix``, without it; reads no values.

    Raises:
        CheckpointError: the list or a shard cannot be read, or is not what torch writes; or a
            tensor is not divided along its first dimension.
    """
    listed = _read_list(folder / METADATA)
    try:
        places = {
            # torch does not store the offset of what is no tensor
            (index.get("fqn"), tuple(index.state.get("offset") or ())): info
            for index, info in listed.get("storage_data").items()
        }
        entries = dict(listed.get("state_dict_metadata"))
    except (AttributeError, LookupError, TypeError):
        raise CheckpointError(f"{folder / METADATA}: is not a list of shards") from None
    tensors = {}
    for name, entry in entries.items():
        if isinstance(name, str) and name.startswith(prefix):
            try:
                tensors[name.removeprefix(prefix)] = _tensor(folder, name, entry, places)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{folder / METADATA}: tensor {name:.100}: {error!s:.200}"
                ) from None
    return tensors


def _tensor(
    folder: Path, name: str, entry: _Record, places: Mapping[tuple[str, tuple[int, ...]], _Record]
) -> ShardedTensor:
    shape = _sizes(entry.get("size"))
    chunks = sorted((_sizes(c.get("offsets")), _sizes(c.get("sizes"))) for c in entry.get("chunks"))
    row, shards = 0, []
    for offsets, sizes in chunks:
        first = offsets[0] if offsets else 0
        if any(offsets[1:]) or sizes[1:] != shape[1:] or first != row:
            raise ValueError("its shards do not follow each other along the first dimension")
        row += sizes[0] if sizes else 1
        info = places[name, offsets]
        file = info.get("relative_path")
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".distcp"):
            raise ValueError(f"{file!r:.100} is not the name of a .distcp file")
        offset, length = _sizes((info.get("offset"), info.get("length")))
        shards.append(read_slice(folder / file, offset, length, sizes))
    if row != (shape[0] if shape else 1) or len({shard.dtype for shard in shards}) != 1:
        raise ValueError("its shards do not cover it")
    loaders = tuple(partial(read_mapped, shard) for shard in shards)
    return ShardedTensor(shape, STORED_DTYPES[shards[0].dtype], loaders)


def _sizes(found: Any) -> tuple[int, ...]:
    sizes = tuple(found)
    for size in sizes:
        if type(size) is not int or not 0 <= size < 2**48:
            raise ValueError(f"{size!r:.100} is not a size")
    return sizes


def _read_list(path: Path) -> _Record:
    try:
        if path.stat().st_size > _MOST_METADATA_BYTES:
            raise CheckpointError(f"{path}: has more than {_MOST_METADATA_BYTES} bytes")
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{path}: cannot be read: {error!s:.200}") from None
    if not isinstance(found, _Record) or not isinstance(found.state, dict):
        raise CheckpointError(f"{path}: is not a list of shards")
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if name in _RECORDS.get(module, ()):
            return _Record
        raise pickle.UnpicklingError(f"{module}.{name} is not known")

    def persistent_load(self, found: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects elsewhere")
