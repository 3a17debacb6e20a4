"""Reads folders of torch.distributed.checkpoint: shards in files that ``.metadata`` lists."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from weights.checkpoints.importers.lingua_files import METADATA
from weights.checkpoints.importers.record_pickle import Record, unpickle
from weights.checkpoints.importers.saved_tensors import read_saved, sizes
from weights.checkpoints.importers.sharded_tensor import ShardedTensor
from weights.checkpoints.tensor_files import StoredTensor
from weights.errors import CheckpointError
from weights.text_files import regular_file_bytes

_MOST_METADATA_BYTES = 2**27
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # of Python 3.13
    "torch": (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"),
        *("uint8", "bool", "contiguous_format", "strided"),
    ),
}
_KNOWN: dict[tuple[str, str], Any] = {
    **{(module, name): Record for module, names in _RECORDS.items() for name in names},
    ("torch", "Size"): sizes,
}


def read_shards(folder: Path, prefix: str) -> dict[str, ShardedTensor]:
    """The tensors whose names begin with ``prefix``, without it; reads no values.

    Raises:
        CheckpointError: the list or a shard cannot be read or is not what torch writes, or a
            tensor is not of floats, or not divided along its first dimension.
    """
    path = folder / METADATA
    try:
        entries, places = _read_list(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    tensors = {}
    for name, entry in entries.items():
        if isinstance(name, str) and name.startswith(prefix):
            try:
                tensors[name.removeprefix(prefix)] = _tensor(folder, name, entry, places)
            except ValueError as error:
                raise CheckpointError(f"{path}: tensor {name!r:.100}: {error}") from None
    return tensors


Places = Mapping[tuple[str, tuple[int, ...]], Record]


def _read_list(path: Path) -> tuple[Mapping[Any, Any], Places]:
    """The entries of all tensors by name, and the places of their shards."""
    regular_file_bytes(path, _MOST_METADATA_BYTES)
    listed = _record(unpickle(path.read_bytes(), _KNOWN))
    entries, infos = listed.get("state_dict_metadata"), listed.get("storage_data")
    if type(entries) is not dict or type(infos) is not dict:
        raise ValueError("is not a list of shards")
    places = {}
    for index, info in infos.items():
        name = _record(index).get("fqn")
        # torch leaves the offset of what is no tensor out
        if isinstance(name, str) and index.state.get("offset") is not None:
            places[name, sizes(index.get("offset"))] = _record(info)
    return entries, places


def _tensor(folder: Path, name: str, entry: object, places: Places) -> ShardedTensor:
    shape = sizes(_record(entry).get("size"))
    listed = _record(entry).get("chunks")
    if type(listed) is not list:
        raise ValueError("it has no list of shards")
    chunks = sorted(
        (sizes(_record(chunk).get("offsets")), sizes(_record(chunk).get("sizes")))
        for chunk in listed
    )
    if shape and shape[0]:
        # a rank without rows has an empty shard
        chunks = [(offsets, chunk) for offsets, chunk in chunks if chunk[:1] != (0,)]
    row = 0
    for offsets, chunk in chunks:
        is_next = len(offsets) == len(chunk) == len(shape) and offsets[:1] in ((row,), ())
        if not is_next or any(offsets[1:]) or chunk[1:] != shape[1:]:
            raise ValueError("its shards do not follow each other along the first dimension")
        row += chunk[0] if chunk else 1
    if not chunks or row != (shape[0] if shape else 1):
        raise ValueError("its shards do not cover it")
    shards = tuple(_shard(folder, name, chunk, places.get((name, at))) for at, chunk in chunks)
    if len({shard.dtype for shard in shards}) != 1:
        raise ValueError("its shards have several dtypes")
    return ShardedTensor(shape, shards)


def _shard(folder: Path, name: str, shape: tuple[int, ...], info: Record | None) -> StoredTensor:
    if info is None:
        raise ValueError("a shard has no place")
    file = info.get("relative_path")
    if type(file) is not str or Path(file).name != file or not file.endswith(".distcp"):
        raise ValueError("the file of a shard is not the name of a .distcp file")
    offset, length = sizes((info.get("offset"), info.get("length")))
    found = read_saved(folder / file, offset, length)
    if not isinstance(found, StoredTensor):
        raise ValueError("a shard is not a contiguous tensor of floats")
    if found.shape != shape:
        raise ValueError(f"a shard has shape {list(found.shape)}, not {list(shape)}")
    return replace(found, name=name)


def _record(found: object) -> Record:
    if type(found) is not Record:
        raise ValueError("is not a list of shards")
    return found
