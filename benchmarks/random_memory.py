"""Writes a model with random memory layers in place of some feed-forwards, for timing only."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.memory_variant import can_have_memory, with_memory
from engine.model.transformer import Transformer
from weights.checkpoints.checkpoint import expected_tensors, save_checkpoint
from weights.checkpoints.convert import read_folder
from weights.checkpoints.tensor_files import TensorSource
from weights.errors import CheckpointError
from weights.training.initialise import initialise, initialise_table

_DRAWN_ROWS = 2**12  # repeated to fill the table; row values do not affect the time


def write_variant(source: Path, target: Path, num_subkeys: int) -> None:
    """Write the model of ``source`` with three equally spaced Memory+ layers to ``target``.

    The layers have 4 heads, 32 rows per head, and query and value widths as in the paper. They
    share one table of ``num_subkeys`` squared rows. Weights are initialised as for training, with
    seed 0.

    Raises:
        CheckpointError: the source cannot be read, has too few layers, memory layers, or weights
            in groups of few bits; or the target exists.
        ValueError: ``num_subkeys`` is less than the rows per head, or too large.
    """
    imported = read_folder(source, None)
    plain = imported.config.model
    if not can_have_memory(plain):
        raise CheckpointError(f"{source}: the model needs more than 3 layers and no memory layers")
    model = with_memory(plain, num_subkeys)
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
        if name not in sources_by_name:
            is_table = name in model.table_names
            load = (
                partial(_table_parts, shape, dtype, generator)
                if is_table
                else partial(new_weights.pop, name)
            )
            sources_by_name[name] = TensorSource(name, shape, dtype, load)
        sources.append(sources_by_name[name])
    save_checkpoint(target, replace(imported.config, model=model), sources, imported.extra_files)


def _table_parts(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yields the table in parts that repeat the same rows: it may be larger than memory."""
    part_RV = torch.empty(min(shape[0], _DRAWN_ROWS), shape[1])
    initialise_table(part_RV, generator)
    part_RV = part_RV.to(dtype)
    for first in range(0, shape[0], len(part_RV)):
        yield part_RV[: shape[0] - first]
