"""Reads and writes patch folders: patch.safetensors with rows and deltas, and patch.json."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weights.checkpoints.new_folder import check_new_folder, new_folder, write_synced
from weights.checkpoints.tensor_files import (
    STORED_DTYPES,
    StoredTensor,
    TensorSource,
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
    CheckSize,
    check_headers,
    check_row_ids,
    first_not_finite,
)
from weights.patches.patch_header import read_header

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
    found = content_hash(tensors, _FiniteCheck("patch", tensors))
    _check_ids("patch", tensors, description)
    return StoredPatch(description, tables, found)


def read_patch(
    folder: Path,
    model: ModelIdentity | None = None,
    check_size: CheckSize | None = None,
    *,
    follow: bool = True,
) -> StoredPatch:
    """Read and check a patch folder. Memory is allocated only after sizes were checked.

    Each file is opened once, so that what was checked is what is read.

    Args:
        folder: the patch folder. Its files must not be symbolic links.
        model: the model that the patch must have been made for; None accepts any.
        check_size: called with the rows over all tables, and the bytes of memory that they take
            with their hash indexes; it refuses the patch by PatchRefusedError.
        follow: the folder may be a symbolic link.

    Raises:
        PatchError: the folder is not a valid patch, or not one for the model; the message names
            file, table and field.
        PatchReadError: the files cannot be read now, or memory for them is missing.
    """
    with opened_files(folder, DESCRIPTION_FILE, TENSORS_FILE, follow=follow) as (json_file, file):
        description = read_description(json_file)
        if model is not None:
            model.check(description, json_file.path)
        header = read_header(file)
        stored = header.tensors
        check_headers(file.path, stored, description, check_size)
        header.check()
        tensors = {name: _memory(file, one) for name, one in stored.items()}
        found = content_hash(tensors, _Reader(file, stored, tensors))
    _check_ids(str(file.path), tensors, description)
    tables = {name: (tensors[name + ROWS], tensors[name + DELTAS]) for name in description.shapes}
    return StoredPatch(description, tables, found)


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


@dataclass(frozen=True, eq=False)
class _FiniteCheck:
    """Refuses parts of deltas with values that are not finite; see ``content_hash.OnPart``."""

    where: str
    tensors: Mapping[str, Tensor]

    def __call__(self, name: str, first: int, part: memoryview) -> None:
        if not name.endswith(DELTAS):
            return
        deltas_PV = self.tensors[name]
        found = first_not_finite(part, deltas_PV.itemsize)
        if found is not None:
            at, value = divmod(first // deltas_PV.itemsize + found, deltas_PV.shape[1])
            raise PatchError(
                f"{self.where}: tensor {name}: value [{at}, {value}] is NaN or infinite"
            )


@dataclass(frozen=True, eq=False)
class _Reader:
    """Reads parts of tensors from the file into their memory, and checks them."""

    file: OpenedFile
    stored: Mapping[str, StoredTensor]
    tensors: Mapping[str, Tensor]

    def __call__(self, name: str, first: int, part: memoryview) -> None:
        if self.file.read_into(part, self.stored[name].offset + first) < len(part):
            raise PatchError(f"{self.file.path}: ends within tensor {name}")
        _FiniteCheck(str(self.file.path), self.tensors)(name, first, part)


def _memory(file: OpenedFile, stored: StoredTensor) -> Tensor:
    try:
        # not on huge pages: the kernel may move others to make room, for three times as long
        return torch.empty(stored.shape, dtype=STORED_DTYPES[stored.dtype])
    except RuntimeError:
        raise PatchReadError(f"{file.path}: tensor {stored.name} does not fit in memory") from None


def _tensors(tables: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a patch by their names in the file."""
    pairs = tables.items()
    named = {name + ROWS: rows.contiguous() for name, (rows, _) in pairs}
    return named | {name + DELTAS: deltas.contiguous() for name, (_, deltas) in pairs}


def _check_ids(where: str, tensors: Mapping[str, Tensor], description: PatchDescription) -> None:
    for table, (num_rows, _) in description.shapes.items():
        check_row_ids(f"{where}: tensor {table + ROWS}", tensors[table + ROWS], num_rows)
