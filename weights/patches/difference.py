"""Writes the row patch that turns the tables of one checkpoint folder into those of another."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.table_loading import progress_bar
from weights.checkpoints.tensor_files import StoredTensor, TensorSource
from weights.errors import PatchError
from weights.patches.description import PatchDescription
from weights.patches.model_identity import base_patches_of, model_identity
from weights.patches.patch_checks import DELTAS, ROWS
from weights.patches.patch_folder import check_target, write_patch_sources
from weights.patches.table_rows import paired_rows


def write_difference(first: Path, second: Path, target: Path) -> dict[str, int]:
    """Write the patch whose deltas are the values of ``second`` less those of ``first``, in fp32.

    It has the rows whose values differ. Both folders are read twice, in parts; only row ids are
    held in memory.

    Returns:
        The number of rows by table name.

    Raises:
        PatchError: the folders differ in origins, shapes, or weights that choose rows (the message
            names both hashes or shapes); a difference is NaN or infinite; or the patch cannot be
            written.
        CheckpointError: a folder cannot be read.
    """
    check_target(target)
    model, other = model_identity(first), model_identity(second)
    for field in ("shapes", "row_choice", "origins"):
        one, two = getattr(model, field), getattr(other, field)
        if one != two:
            raise PatchError(f"{field}: {first} has {one}, but {second} has {two}")
    before, after = _tables(first, model.shapes), _tables(second, model.shapes)
    sources: list[TensorSource] = []
    counts: dict[str, int] = {}
    # each table is read once for the ids and once for the deltas
    with progress_bar("tables", 2 * list(before.values())) as progress:
        for name, (_, value_dim) in model.shapes.items():
            changes = partial(_changes, before[name], after[name], progress.update)
            rows_P = torch.cat([rows for rows, _ in changes()])
            counts[name] = len(rows_P)
            shape = len(rows_P), value_dim
            sources += [
                TensorSource(name + ROWS, rows_P.shape, torch.int64, rows_P.cpu),
                TensorSource(name + DELTAS, shape, torch.float32, partial(_deltas, changes)),
            ]
        description = PatchDescription(
            model.origins,
            model.row_choice,
            model.shapes,
            base_patches_of(before.values()),
            settings={"command": "diff"},
        )
        write_patch_sources(target, description, sources)
    return counts


def _tables(folder: Path, names: Iterable[str]) -> dict[str, StoredTensor]:
    _, stored = open_checkpoint(folder)
    return {name: stored[name] for name in names}


def _changes(
    before: StoredTensor, after: StoredTensor, on_bytes: Callable[[int], object]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and deltas of the rows whose values differ, in parts."""
    for start, old_PV, new_PV in paired_rows(before, after):
        # NaN differs from itself, so that it is refused below
        rows_P = (old_PV != new_PV).any(dim=1).nonzero().squeeze(1)
        deltas_PV = (new_PV[rows_P] - old_PV[rows_P]).float()
        if (wrong := (~deltas_PV.isfinite()).any(dim=1).nonzero()).numel():
            row = start + int(rows_P[wrong[0, 0]])
            raise PatchError(
                f"{after.file}: tensor {after.name}: row {row} has no finite difference"
            )
        yield rows_P + start, deltas_PV
        on_bytes(before.num_bytes // before.shape[0] * len(old_PV))


def _deltas(changes: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> Iterator[Tensor]:
    return (deltas for _, deltas in changes())
