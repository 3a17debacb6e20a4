"""Reads and writes patch folders: patch.safetensors with rows and deltas, and patch.json."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memory_ops.anonymous import unpooled_zeros
from memory_ops.patches.patched_rows import patched_bytes
from weights.checkpoints.new_folder import check_new_folder, new_folder, write_synced
from weights.checkpoints.tensor_files import (
    STORED_DTYPES,
    StoredTensor,
    TensorSource,
    tensor_bytes,
)
from weights.checkpoints.tensor_writer import write_tensors
from weights.errors import PatchError, PatchReadError
from weights.patches.content_hash import content_hash
from weights.patches.description import PatchDescription, read_description
from weights.patches.model_identity import ModelIdentity
from weights.patches.opened_folder import OpenedFile, opened_files
from weights.patches.patch_checks import (
    DELTAS,
    ROWS,
    check_headers,
    check_row_ids,
    first_not_finite,
)
from weights.patches.patch_header import PatchHeader, read_header

TENSORS_FILE, DESCRIPTION_FILE = "patch.safetensors", "patch.json"


@dataclass(frozen=True, eq=False)
class StoredPatch:
    """The content of a patch folder.

    Attributes:
        description: what the patch was made for, and how.
        tables: row ids (int64 ``[P]``, ascending) and deltas (bf16 or fp32 ``[P, V]``) of each
            table, by table name.
        content_hash: BLAKE3 of the tensors; names and settings do not change it.
    """

    description: PatchDescription
    tables: Mapping[str, tuple[Tensor, Tensor]]
    content_hash: str

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(len(rows_P) for rows_P, _ in self.tables.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all row ids and deltas."""
        return sum(rows.nbytes + deltas.nbytes for rows, deltas in self.tables.values())


def stored_patch(
    description: PatchDescription, tables: Mapping[str, tuple[Tensor, Tensor]]
) -> StoredPatch:
    """A patch from tensors in memory, to write; checked as a patch that is read.

    Raises:
        PatchError: an id or a value is not valid; the message names table and field.
    """
    assert tables.keys() == description.shapes.keys()
    for name, (rows_P, deltas_PV) in tables.items():
        assert rows_P.dtype == torch.int64 and deltas_PV.dtype in (torch.bfloat16, torch.float32)
        assert deltas_PV.shape == (len(rows_P), description.shapes[name][1])
    tensors = _tensors(tables)
    found = _checked_hash("patch", tensors)
    _check_ids("patch", tensors, description)
    return StoredPatch(description, tables, found)


@dataclass(frozen=True, eq=False)
class OpenedPatch:
    """A patch folder whose files are open, with checked shapes and unread tensors.

    Attributes:
        description: what the patch was made for, and how.
        header: the header of the file with the tensors.
    """

    description: PatchDescription
    header: PatchHeader

    @property
    def file(self) -> OpenedFile:
        """The file with the tensors."""
        return self.header.file

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """The tensors in the file, by name."""
        return self.header.tensors

    @property
    def table_rows(self) -> dict[str, int]:
        """Rows of each table that the patch changes."""
        return {table: self.stored[table + ROWS].shape[0] for table in self.description.shapes}

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the patch takes, with hash indexes."""
        total = 0
        for table in self.description.shapes:
            deltas = self.stored[table + DELTAS]
            num_rows, value_dim = deltas.shape
            total += patched_bytes(num_rows, value_dim, STORED_DTYPES[deltas.dtype].itemsize)
        return total

    def content_hash(self) -> str:
        """The hash of the tensors as they are in the file, unchecked, in little memory.

        Raises:
            PatchError: the file is truncated.
            PatchReadError: it cannot be read now.
        """

        def read_part(name: str, first: int, size: int) -> memoryview:
            part = memoryview(bytearray(size))
            self._fill(name, first, part)
            return part

        shapes = {
            name: torch.empty(one.shape, dtype=STORED_DTYPES[one.dtype], device="meta")
            for name, one in self.stored.items()
        }
        return content_hash(shapes, read_part)

    def read(self) -> StoredPatch:
        """Read and check the tensors, whose sizes the caller has found acceptable.

        Raises:
            PatchError: ids or values are not valid, or the file is truncated.
            PatchReadError: it cannot be read now, or memory for the tensors is missing.
        """
        where = str(self.file.path)
        self.header.check()
        tensors = {name: _memory(self.file, one) for name, one in self.stored.items()}
        found = _checked_hash(where, tensors, self._fill)
        _check_ids(where, tensors, self.description)
        names = self.description.shapes
        tables = {name: (tensors[name + ROWS], tensors[name + DELTAS]) for name in names}
        return StoredPatch(self.description, tables, found)

    def _fill(self, name: str, first: int, part: memoryview) -> None:
        if self.file.read_into(part, self.stored[name].offset + first) < len(part):
            raise PatchError(f"{self.file.path}: ends within tensor {name}")


@contextmanager
def opened_patch(
    folder: Path, model: ModelIdentity | None = None, *, follow: bool = True
) -> Iterator[OpenedPatch]:
    """Open a patch folder, and check everything but its tensors' values.

    Each file is opened once, so that what was checked is what is read.

    Args:
        folder: the patch folder. Its files must not be symbolic links.
        model: the model that the patch must have been made for; None accepts any.
        follow: the folder may be a symbolic link.

    Raises:
        PatchError: the folder is not a valid patch, or not one for the model; the message names
            file, table and field.
        PatchReadError: the files cannot be read now.
    """
    with opened_files(folder, DESCRIPTION_FILE, TENSORS_FILE, follow=follow) as (json_file, file):
        description = read_description(json_file)
        if model is not None:
            model.check(description, json_file.path)
        header = read_header(file)
        check_headers(file.path, header.tensors, description)
        yield OpenedPatch(description, header)


def read_patch(
    folder: Path, model: ModelIdentity | None = None, *, follow: bool = True
) -> StoredPatch:
    """Read and check a patch folder; see ``opened_patch`` and ``OpenedPatch.read``."""
    with opened_patch(folder, model, follow=follow) as opened:
        return opened.read()


def check_target(folder: Path) -> None:
    """Raise PatchError unless a folder can be created, before work is done for its content.

    Its parent is created. A broken symbolic link takes the name, too.
    """
    if os.path.lexists(folder):
        raise PatchError(f"{folder}: exists already")
    try:
        check_new_folder(folder)
    except OSError as error:
        raise PatchError(f"{folder}: cannot be created ({error.strerror})") from None


def write_patch(folder: Path, patch: StoredPatch) -> None:
    """Write a patch folder atomically.

    Raises:
        PatchError: the folder exists, or cannot be written.
    """
    sources = [
        TensorSource(name, tuple(tensor.shape), tensor.dtype, tensor.cpu)
        for name, tensor in _tensors(patch.tables).items()
    ]
    write_patch_sources(folder, patch.description, sources)


def write_patch_sources(
    folder: Path, description: PatchDescription, sources: list[TensorSource]
) -> None:
    """Like ``write_patch``, with tensors that are loaded while they are written, and valid."""
    check_target(folder)
    try:
        with new_folder(folder) as partial:
            write_tensors(partial / TENSORS_FILE, sources, lambda num_bytes: None)
            write_synced(partial / DESCRIPTION_FILE, description.to_json())
    except OSError as error:
        raise PatchError(f"{folder}: cannot be written ({error.strerror})") from None


def _checked_hash(
    where: str,
    tensors: Mapping[str, Tensor],
    fill: Callable[[str, int, memoryview], None] = lambda name, first, part: None,
) -> str:
    """The content hash of tensors whose parts ``fill`` reads; PatchError if a delta is not finite.

    Each part is read, checked and hashed while it is in a core's cache.
    """

    def read_part(name: str, first: int, size: int) -> memoryview:
        tensor = tensors[name]
        part = tensor_bytes(tensor)[first : first + size]
        fill(name, first, part)
        found = first_not_finite(part, tensor.itemsize) if name.endswith(DELTAS) else None
        if found is not None:
            at, value = divmod(first // tensor.itemsize + found, tensor.shape[1])
            raise PatchError(f"{where}: tensor {name}: value [{at}, {value}] is NaN or infinite")
        return part

    return content_hash(tensors, read_part)


def _memory(file: OpenedFile, stored: StoredTensor) -> Tensor:
    try:
        return unpooled_zeros(stored.shape, STORED_DTYPES[stored.dtype])
    except OSError:
        raise PatchReadError(f"{file.path}: tensor {stored.name} does not fit in memory") from None


def _tensors(tables: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a patch by their names in the file."""
    pairs = tables.items()
    named = {name + ROWS: rows.contiguous() for name, (rows, _) in pairs}
    return named | {name + DELTAS: deltas.contiguous() for name, (_, deltas) in pairs}


def _check_ids(where: str, tensors: Mapping[str, Tensor], description: PatchDescription) -> None:
    for table, (num_rows, _) in description.shapes.items():
        check_row_ids(f"{where}: tensor {table + ROWS}", tensors[table + ROWS], num_rows)
