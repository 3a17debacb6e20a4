"""Writes models with random memory layers, or tables of another size, for timing only."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.memory_variant import can_have_memory, with_memory
from engine.model.config import ModelConfig
from engine.model.transformer import Transformer
from memory_ops.operations import quantize_rows
from weights.checkpoints.checkpoint import expected_tensors, save_checkpoint
from weights.checkpoints.convert import read_folder
from weights.checkpoints.hot_rows import HOT_ROWS_FILE
from weights.checkpoints.table_files import RowLayout, row_layout
from weights.checkpoints.tensor_files import TensorSource
from weights.errors import CheckpointError
from weights.training.initialise import initialise, initialise_subkeys, initialise_table

_DRAWN_ROWS = 2**12  # repeated to fill the table; row values do not affect the time
_SUBKEYS = ".memory.subkeys"


def variant_config(source: Path, plain: ModelConfig, num_subkeys: int) -> ModelConfig:
    """The model of ``source`` with the benchmarks' memory layers; see ``with_memory``.

    Raises:
        CheckpointError: it has too few layers, or memory layers.
        ValueError: ``num_subkeys`` is less than the rows per head, or too large.
    """
    if not can_have_memory(plain):
        raise CheckpointError(f"{source}: the model needs more than 3 layers and no memory layers")
    return with_memory(plain, num_subkeys)


def write_variant(
    source: Path, target: Path, num_subkeys: int, table_dtype: str | None = None
) -> None:
    """Write the model of ``source`` with three equally spaced Memory+ layers to ``target``.

    The layers have 4 heads, 32 rows per head, and query and value widths as in the paper. They
    share one table of ``num_subkeys`` squared rows. Weights are initialised as for training, with
    seed 0. ``table_dtype`` is one of ``TABLE_DTYPES``; None is that of the weights.

    Raises:
        CheckpointError: the source cannot be read, has too few layers, memory layers, or weights
            in groups of few bits; or the target exists.
        ValueError: ``num_subkeys`` is less than the rows per head, or too large.
    """
    imported = read_folder(source, None)
    model = variant_config(source, imported.config.model, num_subkeys)
    if imported.config.has_groups:
        raise CheckpointError(
            f"{source}: the weights are rounded to 8 or 4 bits; make a dense folder by"
            " `memplus convert --dtype`"
        )
    sources_by_name = {tensor.name: tensor for tensor in imported.sources}
    dtype = imported.sources[0].dtype
    generator = torch.Generator().manual_seed(0)
    model_with_random_weights = Transformer(model)
    initialise(model_with_random_weights, generator)
    new_weights: dict[str, Tensor] = model_with_random_weights.state_dict()
    sources: list[TensorSource] = []
    for name, tensor in expected_tensors(model).items():
        shape = tuple(tensor.shape)
        if name in model.table_names:
            layout = RowLayout(str(dtype), shape, dtype)
            if table_dtype is not None:
                layout = row_layout(table_dtype, *shape)
            sources.append(_drawn_table(name, layout, shape[1], generator))
        elif name in sources_by_name:
            sources.append(sources_by_name[name])
        else:
            sources.append(TensorSource(name, shape, dtype, partial(new_weights.pop, name)))
    save_checkpoint(target, replace(imported.config, model=model), sources, imported.extra_files)


def write_resized(source: Path, target: Path, num_subkeys: int, table_dtype: str) -> None:
    """Write the model of ``source`` with tables of ``num_subkeys`` squared rows to ``target``.

    Rows and subkeys are drawn as for training, with seed 0; all other weights are kept.
    ``table_dtype`` is one of ``TABLE_DTYPES``.

    Raises:
        CheckpointError: the source cannot be read, or the target exists.
        ValueError: ``num_subkeys`` is less than the rows per head, or too large.
    """
    imported = read_folder(source, None)
    memory = imported.config.model.memory
    assert memory is not None
    model = replace(imported.config.model, memory=replace(memory, num_subkeys=num_subkeys))
    layout = row_layout(table_dtype, num_subkeys**2, memory.value_dim)
    generator = torch.Generator().manual_seed(0)
    sources: list[TensorSource] = []
    for one in imported.sources:
        if one.name in model.table_names:
            sources.append(_drawn_table(one.name, layout, memory.value_dim, generator))
        elif one.name.endswith(_SUBKEYS):
            heads, halves, _, width = one.shape
            shape = heads, halves, num_subkeys, width
            load = partial(_drawn_subkeys, shape, one.dtype, generator)
            sources.append(TensorSource(one.name, shape, one.dtype, load))
        else:
            sources.append(one)
    # hot rows are rows of the model's own tables
    files = {name: text for name, text in imported.extra_files.items() if name != HOT_ROWS_FILE}
    save_checkpoint(target, replace(imported.config, model=model), sources, files)


def _drawn_table(
    name: str, layout: RowLayout, value_dim: int, generator: torch.Generator
) -> TensorSource:
    load = partial(_table_parts, layout, value_dim, generator)
    return TensorSource(name, layout.shape, layout.dtype, load, layout.metadata)


def _table_parts(layout: RowLayout, value_dim: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields the table in parts that repeat the same rows: it may be larger than memory."""
    num_rows = layout.shape[0]
    part_RV = torch.empty(min(num_rows, _DRAWN_ROWS), value_dim)
    initialise_table(part_RV, generator)
    if layout.records is None:
        part_RB = part_RV.to(layout.dtype)
    else:
        part_RB = quantize_rows(part_RV, layout.records[0]).records_RB
    for first in range(0, num_rows, len(part_RB)):
        yield part_RB[: num_rows - first]


def _drawn_subkeys(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    subkeys_H2Nk = torch.empty(shape)
    initialise_subkeys(subkeys_H2Nk, generator)
    return subkeys_H2Nk.to(dtype)
