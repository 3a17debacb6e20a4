"""Loads the share of one tensor-parallel rank: its parts of the weights and of the value tables."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.executors.parallel.collectives import Collectives
from engine.executors.parallel.sharded_model import rank_model
from engine.executors.parallel.shares import RankShare
from engine.executors.parallel.tables import shared_table
from engine.model.transformer import Transformer
from memory_ops.checks import Table
from memory_ops.row_formats import INT4_GROUP, RowRecords, record_columns
from memory_ops.tables.device import DeviceTable
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.device_loading import OnBytes
from weights.checkpoints.model_weights import dense_mapped_weights, weight_bytes
from weights.checkpoints.stored_groups import stored_formats
from weights.checkpoints.table_files import (
    RowLayout,
    converted_parts,
    requested_layout,
    row_layout,
)
from weights.checkpoints.table_loading import allocated_rows, progress_bar
from weights.checkpoints.tensor_files import STORED_DTYPES, StoredTensor
from weights.checkpoints.tied_head import EMBEDDING, HEAD


def load_share(
    folder: Path,
    share: RankShare,
    group: Collectives,
    dtype: torch.dtype,
    table_dtype: str = "auto",
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    make_part: Callable[[Table], DeviceTable] = DeviceTable,
) -> Transformer:
    """Load one rank's model, with its tables; no rank has the whole model in memory.

    Embedding and head are whole on every rank: on a CPU, as mappings that ranks share if they are
    stored in ``dtype``. Weights in groups are converted to ``dtype``, one layer at a time. Tables
    are converted to ``table_dtype`` first, then split, so that every rank has the values that one
    process would have.

    Args:
        folder: the checkpoint folder.
        share, group: the rank.
        dtype: dtype of the weights.
        table_dtype: one of ``TABLE_DTYPES``, or auto, which keeps the stored dtype.
        device: where the model runs.
        make_part: makes this rank's part of a table from its rows.

    Raises:
        CheckpointError, ConfigError: as ``load_model``.
    """
    config, stored = open_checkpoint(folder)
    tables = [stored.pop(name) for name in config.model.table_names]
    layouts = {one.name: checked_layout(one, table_dtype, share) for one in tables}
    model = rank_model(share, group)
    with torch.device("meta"):
        shapes = Transformer(config.model).state_dict()
    inputs = {name: shapes[f"{name}.weight"].shape[1] for name in stored_formats(stored)}

    def part(name: str, weight: Tensor) -> Tensor:
        found = share.part(name)
        # at once, so that the host has one weight at a time in memory if this is a GPU
        return (weight if found is None else found.of(weight)).to(device)

    model.load_state_dict(dense_mapped_weights(stored, dtype, inputs, part), assign=True)
    model.rope_frequencies = model.rope_frequencies.to(device)
    with progress_bar("tables", tables) as progress:
        loaded = {}
        for one in tables:
            rows = _share_of_rows(one, layouts[one.name], share, device, progress.update)
            loaded[one.name] = shared_table(make_part(rows), share, group)
    model.attach_tables(loaded)
    return model.eval().requires_grad_(False)


def copied_bytes(stored: Mapping[str, StoredTensor], share: RankShare, dtype: torch.dtype) -> int:
    """Bytes in ``dtype`` of the weights of which each rank has a whole copy.

    ``stored`` has the tensors without the tables. Embedding and head are not counted if the ranks
    map them.
    """
    copied = {
        name: one
        for name, one in stored.items()
        if share.part(name) is None and not is_mapped(name, one, dtype)
    }
    return weight_bytes(copied, dtype, {})


def share_bytes(share: RankShare, group: Collectives, dtype: torch.dtype) -> int:
    """Bytes in ``dtype`` of one rank's weights, without the tables, if it maps none of them."""
    weights: Mapping[str, Tensor] = rank_model(share, group).state_dict()
    return dtype.itemsize * sum(one.numel() for one in weights.values())


def table_share_bytes(tables: Sequence[StoredTensor], table_dtype: str, share: RankShare) -> int:
    """Bytes of this rank's part of the tables; errors as ``checked_layout``."""
    layouts = (checked_layout(one, table_dtype, share) for one in tables)
    return sum(share_layout(layout, share).num_bytes for layout in layouts)


def is_mapped(name: str, stored: StoredTensor | None, dtype: torch.dtype) -> bool:
    """Whether ranks on a CPU map a weight's file, so that they have the weight in memory once.

    ``stored`` is None for a weight in ``dtype`` that is not written yet.
    """
    return name in (EMBEDDING, HEAD) and (stored is None or STORED_DTYPES[stored.dtype] is dtype)


def checked_layout(stored: StoredTensor, table_dtype: str, share: RankShare) -> RowLayout:
    """The layout of a whole table in ``table_dtype``.

    Raises:
        CheckpointError: the file does not describe its rows.
        ConfigError: rows cannot be converted, or split into ``share``'s columns.
    """
    layout = requested_layout(stored, None if table_dtype == "auto" else table_dtype)
    share_layout(layout, share)
    return layout


def share_layout(layout: RowLayout, share: RankShare) -> RowLayout:
    """The layout of a rank's part of a table: its rows, or its columns of all rows.

    Raises:
        ConfigError: the columns are not whole groups of a row.
    """
    shape = len(share.read_rows), len(share.read_columns)
    if share.table_sharding == "columns" and layout.name == "int4" and shape[1] % INT4_GROUP:
        raise ConfigError(
            f"tensor_parallel: {share.size} ranks would have {shape[1]} columns of int4 rows, whose"
            f" groups have {INT4_GROUP}; use --table-sharding rows or fewer ranks"
        )
    is_float = layout.records is None
    return replace(layout, shape=shape) if is_float else row_layout(layout.name, *shape)


def _share_of_rows(
    stored: StoredTensor,
    layout: RowLayout,
    share: RankShare,
    device: torch.device,
    on_bytes: OnBytes,
) -> Tensor | RowRecords:
    """This rank's rows, or its columns of all rows, in the memory of a device."""
    made, columns = share_layout(layout, share), share.read_columns
    if share.table_sharding == "rows":
        stored = stored.row_range(share.read_rows)
        layout = replace(layout, shape=(len(share.read_rows), *layout.shape[1:]))
    if device.type == "cpu":
        target = allocated_rows(made, "device", stored.name)
    else:
        target = torch.empty(made.shape, dtype=made.dtype, device=device)
    first, row_bytes = 0, stored.num_bytes // stored.shape[0]
    for part in _parts(stored, layout, columns):
        # waits for a copy to a GPU, so that the next part can reuse the buffer
        target[first : first + len(part)].copy_(part)
        first += len(part)
        on_bytes(row_bytes * len(part))
    return made.table(target)


def _parts(stored: StoredTensor, layout: RowLayout, columns: range) -> Iterator[Tensor]:
    """Columns of all rows in order, in parts."""
    for part in converted_parts(stored, layout):
        if layout.records is None:
            yield part[:, columns.start : columns.stop]
        elif len(columns) == layout.records[1]:
            yield part
        else:
            yield record_columns(RowRecords(part, *layout.records), columns).records_RB
