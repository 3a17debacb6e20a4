"""Opens GGUF files with bounded memory, and reads their metadata with checked types."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np

from weights.checkpoints.importers.gguf_data import GgufData
from weights.errors import CheckpointError
from weights.text_files import regular_file_bytes

# numbers, strings and their lengths in all keys and tensor names; a large vocabulary needs a
# quarter, and each takes about 200 bytes while the file is read
_MOST_VALUES = 2**23
_MOST_DIMS, _MOST_BYTES = 4, 2**62
Kind = TypeVar("Kind", int, float, str, bool)


class _BoundedReader(gguf.GGUFReader):
    """A reader that does not believe lengths that exceed the file or ``_MOST_VALUES``.

    It checks sizes of tensors in exact integers, because those of the library wrap around. Tensors
    must follow each other without gaps, as llama.cpp requires. Their ``data`` are GgufData.
    """

    def __init__(self, path: Path) -> None:
        self._num_values = 0
        self._path, self._status = path, os.stat(path)
        super().__init__(path)

    def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **options: Any) -> Any:
        self._num_values += 1
        if self._num_values > _MOST_VALUES:
            raise ValueError(f"its header has more than {_MOST_VALUES} values")
        found = super()._get(offset, dtype, count, *order, **options)
        if len(found) != count:
            raise ValueError("a value continues past the end of the file")
        return found

    def _build_tensors(self, start_offs: int, fields: Sequence[gguf.ReaderField]) -> None:
        expected = 0
        for field in fields:
            *_, dims, kind, offset = field.parts
            shape = [int(size) for size in dims]
            if not 1 <= len(shape) <= _MOST_DIMS:
                raise ValueError(f"tensor {field.name} has {len(shape)} dimensions")
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(kind[0]))]
            num_bytes = math.prod(shape) // block * block_bytes
            if shape[0] % block or num_bytes > _MOST_BYTES:
                raise ValueError(f"tensor {field.name} cannot have the shape {shape}")
            if int(offset[0]) != expected:
                raise ValueError(f"tensor {field.name} is at {offset[0]}, expected {expected}")
            expected += -(-num_bytes // int(self.alignment)) * int(self.alignment)
        super()._build_tensors(start_offs, list(fields))
        self.tensors = [one._replace(data=self._data(one)) for one in self.tensors]

    def _data(self, tensor: gguf.ReaderTensor) -> Any:  # the library has a type for mapped data
        place = tensor.name, self._path, self._status, int(tensor.data_offset)
        return GgufData(*place, tensor.data.shape, tensor.data.dtype)


def open_gguf(file: Path) -> gguf.GGUFReader:
    """Read the header of one file.

    Raises:
        CheckpointError: the file cannot be read, or is not a whole GGUF file.
    """
    regular_file_bytes(file)
    try:
        with np.errstate(over="raise"):
            reader = _BoundedReader(file)
    except (OSError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{file}: is truncated or not a GGUF file ({error})") from None
    if reader.byte_order != "I":
        raise CheckpointError(f"{file}: its byte order is not that of this machine")
    return reader


def value(reader: gguf.GGUFReader, key: str) -> Any:
    """The value of a key, of any type; None if it is missing.

    Raises:
        CheckpointError: it is not valid, for example not UTF-8.
    """
    field = reader.fields.get(key)
    try:
        return None if field is None else field.contents()
    except (ValueError, LookupError) as error:
        raise CheckpointError(f"{key}: cannot be read ({error})") from None


def optional(reader: gguf.GGUFReader, key: str, kind: type[Kind]) -> Kind | None:
    """The value of a key; None if it is missing.

    Raises:
        CheckpointError: it has another type.
    """
    found = value(reader, key)
    if found is not None and type(found) is not kind:
        raise CheckpointError(f"{key}: must be of type {kind.__name__}, not {found!r:.100}")
    return found


def required(reader: gguf.GGUFReader, key: str, kind: type[Kind]) -> Kind:
    """The value of a key.

    Raises:
        CheckpointError: it is missing or has another type.
    """
    found = optional(reader, key, kind)
    if found is None:
        raise CheckpointError(f"{key}: missing")
    return found


def required_list(reader: gguf.GGUFReader, key: str, kind: type[Kind]) -> list[Kind]:
    """The values of a key.

    Raises:
        CheckpointError: it is missing or not an array of this type.
    """
    found = value(reader, key)
    if found is None:
        raise CheckpointError(f"{key}: missing")
    if not isinstance(found, list) or any(type(one) is not kind for one in found):
        raise CheckpointError(f"{key}: must be an array of type {kind.__name__}")
    return found
