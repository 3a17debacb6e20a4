"""One tensor that ``torch.save`` wrote somewhere in a file; what the file says is never run."""

import io
import pickle
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from weights.checkpoints.tensor_files import StoredTensor
from weights.errors import CheckpointError

# torch's names of storages -> safetensors codes
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip entry: lengths of its name and extra field
_MOST_PICKLE_BYTES = 2**16


def read_slice(path: Path, offset: int, length: int, shape: Sequence[int]) -> StoredTensor:
    """Find the bytes of the contiguous tensor of ``shape`` in ``length`` bytes of a file.

    Raises:
        CheckpointError: the bytes are not one such tensor.
    """
    try:
        with open(path, "rb") as file:
            window = _Window(file, offset, length)
            with zipfile.ZipFile(window) as archive:
                return _tensor(path, file, offset, archive, tuple(shape))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, pickle.UnpicklingError, struct.error) as error:
        raise CheckpointError(f"{path}: the tensor at byte {offset}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise CheckpointError(
            f"{path}: the tensor at byte {offset} is damaged: {error!s:.100}"
        ) from None


def _tensor(
    path: Path, file: BinaryIO, offset: int, archive: zipfile.ZipFile, shape: tuple[int, ...]
) -> StoredTensor:
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise ValueError("it is compressed")
    if entries["data.pkl"].file_size > _MOST_PICKLE_BYTES:
        raise ValueError("its pickle is too long")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise ValueError("its bytes are in big-endian order")
    loaded = _Unpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load()
    code, key, first, found_shape, stride = loaded
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    if tuple(found_shape) != shape or first != 0 or list(stride) != strides[: len(shape)]:
        raise ValueError(f"it has shape {list(found_shape)}, not {list(shape)}")
    data = entries[f"data/{key}"]
    num_bytes = _BYTES[code]
    for size in shape:
        num_bytes *= size
    if data.file_size < num_bytes:
        raise ValueError(f"it has {data.file_size} bytes, not {num_bytes}")
    file.seek(offset + data.header_offset)
    name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = offset + data.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    return StoredTensor(path.name, path, code, shape, start, num_bytes)


class _Window(io.RawIOBase):
    """``length`` bytes of a file from ``offset`` on."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("it begins before its bytes")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._offset + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


class _Unpickler(pickle.Unpickler):
    """Returns (safetensors code, key of the bytes, first element, shape, stride) of a tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, first, shape, stride, *rest: (*storage, first, shape, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a tensor of floats")

    def persistent_load(self, found: Any) -> tuple[str, str]:
        kind, code, key, *_ = found
        if kind != "storage" or code not in _BYTES or not isinstance(key, str):
            raise pickle.UnpicklingError("it has no storage of floats")
        return code, key
