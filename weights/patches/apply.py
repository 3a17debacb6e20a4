"""Writes a row patch into the tables of a copy of a checkpoint folder."""

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from memory_ops.row_formats import quantize_rows
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.new_folder import new_folder
from weights.checkpoints.table_files import RowLayout, stored_layout
from weights.checkpoints.table_loading import progress_bar
from weights.checkpoints.table_origin import PATCHES, applied_patches, carried_metadata
from weights.checkpoints.tensor_files import (
    StoredTensor,
    TensorSource,
    has_checksum,
    list_file,
    read_parts,
)
from weights.checkpoints.tensor_writer import write_tensors
from weights.errors import PatchError
from weights.patches.model_identity import model_identity
from weights.patches.patch_folder import StoredPatch, check_target, read_patch
from weights.patches.table_rows import float_rows

logger = logging.getLogger(__name__)


@dataclass
class RoundingError:
    """Distance between the rows that a patch asks for and those that the table can hold.

    Attributes:
        num_rows: rows that were written.
        largest: the largest absolute difference of a value.
        total: sum of the absolute differences of all values of written rows.
        num_values: values in the rows that were written.
    """

    num_rows: int = 0
    largest: float = 0.0
    total: float = 0.0
    num_values: int = 0

    @property
    def mean(self) -> float:
        """The mean absolute difference over all values of written rows."""
        return self.total / max(1, self.num_values)

    def add(self, wanted_PV: Tensor, written_PV: Tensor) -> None:
        """Count the values of written rows."""
        distance_PV = (wanted_PV - written_PV).abs()
        self.largest = max(self.largest, float(distance_PV.max()))
        self.num_rows += len(distance_PV)
        self.num_values += distance_PV.numel()
        self.total += float(distance_PV.sum(dtype=torch.float64))


def apply_patch(model: Path, patch: Path, target: Path) -> dict[str, RoundingError]:
    """Write a copy of a checkpoint folder with a patch's deltas added to its tables.

    Rows are added in fp32 and rounded to the table's format; quantised rows are quantised again.
    Other rows keep their bits. A warning is logged if a table lacks a base patch of the patch, or
    has the patch already. Tables keep their origin, and their files name the patch by its
    content hash. Other files of the folder, but no subfolders, become hard links, or copies if the
    filesystem has none. Holds the patch in memory, and some rows of a table.

    Returns:
        The rounding error of each table of the patch, by table name.

    Raises:
        PatchError: the patch is invalid or not made for this model, a changed row is not finite,
            or the target exists or cannot be written.
        CheckpointError: the model cannot be read, or a table fails its checksum.
    """
    check_target(target)
    read = read_patch(patch, model_identity(model))
    _, stored = open_checkpoint(model)
    changed = [stored[name] for name, (rows_P, _) in read.tables.items() if len(rows_P)]
    for one in changed:
        _check_is_alone(one)
        _warn_of_base(one, read)
    errors = {name: RoundingError() for name in read.tables}
    try:
        with new_folder(target) as partial_folder, progress_bar("tables", changed) as progress:
            for one in changed:
                source = _source(one, read, errors[one.name])
                file = partial_folder / one.file.name
                write_tensors(file, [source], progress.update, with_checksums=True)
            written = {one.file.name for one in changed}
            for file in sorted(model.iterdir()):
                if file.is_file() and file.name not in written:
                    _link_or_copy(file, partial_folder / file.name)
    except OSError as error:
        raise PatchError(f"{target}: cannot be written ({error.strerror})") from None
    return errors


def _source(stored: StoredTensor, patch: StoredPatch, error: RoundingError) -> TensorSource:
    layout = stored_layout(stored)
    metadata = layout.metadata | carried_metadata(stored)
    earlier = metadata.get(PATCHES)
    metadata[PATCHES] = " ".join(filter(None, (earlier, patch.content_hash)))
    load = partial(_patched_parts, stored, layout, *patch.tables[stored.name], error)
    return TensorSource(stored.name, stored.shape, layout.dtype, load, metadata)


def _patched_parts(
    stored: StoredTensor,
    layout: RowLayout,
    rows_P: Tensor,
    deltas_PV: Tensor,
    error: RoundingError,
) -> Iterator[Tensor]:
    first = 0
    # verify first: the new checksum must not cover data that are damaged already
    for part in read_parts(stored, verify=has_checksum(stored)):
        bounds = torch.tensor([first, first + len(part)])
        begin, end = torch.searchsorted(rows_P, bounds).tolist()
        if begin < end:
            at = rows_P[begin:end] - first
            wanted_PV = float_rows(part[at], layout) + deltas_PV[begin:end].float()
            _check_is_finite(wanted_PV, stored, rows_P[begin:end])
            part[at] = _stored_rows(wanted_PV, layout)
            written_PV = float_rows(part[at], layout)
            _check_is_finite(written_PV, stored, rows_P[begin:end])
            error.add(wanted_PV, written_PV)
        yield part
        first += len(part)


def _check_is_finite(values_PV: Tensor, stored: StoredTensor, rows_P: Tensor) -> None:
    if (wrong := (~values_PV.isfinite()).any(dim=1).nonzero()).numel():
        row = int(rows_P[wrong[0, 0]])
        raise PatchError(
            f"{stored.file}: tensor {stored.name}: row {row} plus its delta is NaN or infinite"
        )


def _stored_rows(values_PV: Tensor, layout: RowLayout) -> Tensor:
    """Floating rows in a table's layout."""
    if layout.records is None:
        return values_PV.to(layout.dtype)
    return quantize_rows(values_PV, layout.records[0]).records_RB


def _warn_of_base(table: StoredTensor, patch: StoredPatch) -> None:
    """Warn if the patch was made for a table with other patches, or was written into this one."""
    applied = applied_patches(table)
    if patch.content_hash in applied:
        logger.warning("%s: table %s has this patch already", table.file, table.name)
    expected = patch.description.base_patches.get(table.name, ())
    if missing := [one for one in expected if one not in applied]:
        logger.warning(
            "%s: table %s lacks patches that the patch was made on: %s",
            table.file,
            table.name,
            ", ".join(missing),
        )


def _check_is_alone(table: StoredTensor) -> None:
    others = [one.name for one in list_file(table.file) if one.name != table.name]
    if others:
        raise PatchError(
            f"{table.file}: holds tensor {others[0]} as well as table {table.name}; run"
            f" `memplus convert {table.file.parent} DST` to give each table its own file"
        )


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        # resolved, so that the link is to the file and not to a symbolic link
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)
        with open(target, "rb") as copied:
            os.fsync(copied.fileno())
