"""Finds the tensors that ``torch.save`` wrote into a file, or into a part of one.

Only the list of the tensors is read, as plain data (``record_pickle``); their bytes stay in the
file.
"""

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from weights.checkpoints.importers.record_pickle import Record, unpickle
from weights.checkpoints.tensor_files import DTYPES, StoredTensor
from weights.errors import CheckpointError
from weights.text_files import regular_file_bytes

# torch's names of storages -> safetensors codes
_FLOATS = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
}
_OTHERS = ("LongStorage", "IntStorage", "ShortStorage", "CharStorage", "ByteStorage", "BoolStorage")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: the lengths of its name and extra field
_MOST_READ_BYTES = 2**24  # of the zip's directory, and of the list of tensors
_MOST_SIZE = 2**48


class _Storage(NamedTuple):
    code: str  # empty for what is no float
    key: str


def read_saved(path: Path, offset: int = 0, length: int | None = None) -> Any:
    """Read an object that ``torch.save`` wrote into ``length`` bytes of a file, or into all of it.

    Contiguous tensors of floats are ``StoredTensor`` without a name; other objects are ``Record``.

    Raises:
        CheckpointError: the file cannot be read, is not of torch's uncompressed zip format, or
            holds other things than dictionaries, lists, numbers, texts and tensors.
    """
    where = f"{path}: byte {offset}" if offset else str(path)
    regular_file_bytes(path)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            window = _Window(file, offset, size - offset if length is None else length)
            with zipfile.ZipFile(window) as archive:
                return _Saved(path, file, window, archive).load()
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise CheckpointError(f"{where}: is not a zip file, as torch.save writes it") from None
    except Exception as error:  # a damaged zip file raises anything
        raise CheckpointError(f"{where}: {str(error) or type(error).__name__:.200}") from None


class _Saved:
    """One archive of torch.save."""

    def __init__(
        self, path: Path, file: BinaryIO, window: "_Window", archive: zipfile.ZipFile
    ) -> None:
        self._path, self._file, self._window, self._archive = path, file, window, archive
        self._entries: Mapping[str, zipfile.ZipInfo] = {
            entry.filename.partition("/")[2]: entry for entry in archive.infolist()
        }
        self._starts: dict[str, int] = {}

    def load(self) -> Any:
        if "byteorder" in self._entries and self._read("byteorder", 16) != b"little":
            raise ValueError("is in big-endian order")
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
            ("collections", "OrderedDict"): lambda *items: {},
        }
        # a pickle names the class of a storage and does not call it
        known |= {("torch", name): code for name, code in _FLOATS.items()}
        known |= {("torch", name): "" for name in _OTHERS}
        return unpickle(self._read("data.pkl", _MOST_READ_BYTES), known, self._storage)

    def _read(self, name: str, most: int) -> bytes:
        entry = self._entry(name)
        if entry.file_size > most:
            raise ValueError(f"{name} has {entry.file_size} bytes, more than {most}")
        return self._archive.read(entry)

    def _entry(self, name: str) -> zipfile.ZipInfo:
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"{name:.100} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(f"{name:.100} is compressed or encrypted")
        return entry

    def _storage(self, found: Any) -> _Storage:
        kind, code, key, *_ = found
        if kind != "storage" or code not in ("", *DTYPES) or type(key) is not str:
            raise ValueError("a storage is not one of torch's")
        return _Storage(code, key)

    def _tensor(self, storage: Any, first: Any, shape: Any, stride: Any, *rest: Any) -> Any:
        if type(storage) is not _Storage or type(shape) is not tuple:
            raise ValueError("a tensor has no storage")
        sizes(shape)
        if not storage.code or not _is_contiguous(shape, sizes(stride)):
            return Record()
        (first,) = sizes((first,))
        item = DTYPES[storage.code].itemsize
        num_bytes = item * math.prod(shape)
        entry = self._entry(f"data/{storage.key}")
        if item * first + num_bytes > entry.file_size:
            raise ValueError(f"a tensor of shape {list(shape)} has {entry.file_size} bytes")
        start = self._start(entry) + item * first
        if start + num_bytes > self._window.end:
            raise ValueError("a tensor ends after the file")
        return StoredTensor("", self._path, storage.code, shape, start, num_bytes)

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """The offset in the file of an entry's bytes."""
        if entry.filename not in self._starts:
            begin = self._window.offset + entry.header_offset
            self._file.seek(begin)
            header = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
            signature, name_length, extra_length = header
            if signature != b"PK\3\4":
                raise ValueError("an entry has no header")
            self._starts[entry.filename] = begin + _LOCAL_HEADER.size + name_length + extra_length
        return self._starts[entry.filename]


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for size, found in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and found != step:
            return False
        step *= size
    return True


def sizes(found: Any) -> tuple[int, ...]:
    """A tuple of sizes.

    Raises:
        ValueError: it is something else.
    """
    if type(found) is not tuple or len(found) > 64 or any(type(one) is not int for one in found):
        raise ValueError("expected a tuple of sizes")
    if any(not 0 <= one < _MOST_SIZE for one in found):
        raise ValueError(f"a size is not between 0 and {_MOST_SIZE}")
    return found


class _Window(io.RawIOBase):
    """``length`` bytes of a file from ``offset`` on."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._length, self._at = file, length, 0
        self.offset, self.end = offset, offset + length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("begins before its first byte")  # zipfile expects this error
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size < 0 else min(size, left)
        if size > _MOST_READ_BYTES:
            raise ValueError(f"has more than {_MOST_READ_BYTES} bytes of directory")
        self._file.seek(self.offset + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data
