"""A model with memory layers of random weights for some feed-forwards: to be timed, not read."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.model.config import MEMORY_KINDS, MemoryConfig, ModelConfig
from engine.model.transformer import Transformer
from weights.checkpoints.checkpoint import expected_shapes, save_checkpoint
from weights.checkpoints.convert import read_folder
from weights.checkpoints.tensor_files import TensorSource
from weights.errors import CheckpointError
from weights.training.initialise import initialise, initialise_table

MEMORY_LAYERS = 3  # as many as the paper's models have
NUM_HEADS, TOP_K = 4, 32
_DRAWN_ROWS = 2**12  # which are repeated: what a row holds takes no time


def write_variant(source: Path, target: Path, num_subkeys: int) -> None:
    """Write the model of ``source`` with three Memory+ layers, equally spaced, as ``target``.

    They have 4 heads, 32 rows a head, queries and values of the paper's widths, and one table of
    ``num_subkeys`` squared rows; weights are drawn as for training, from seed 0.

    Raises:
        CheckpointError: the source cannot be read, has too few layers or memory layers already; the
            target exists.
        ValueError: ``num_subkeys`` is fewer than the rows a head, or too many.
    """
    imported = read_folder(source, None)
    model = with_memory(imported.config.model, num_subkeys, source)
    kept = {tensor.name: tensor for tensor in imported.sources}
    dtype = imported.sources[0].dtype
    generator = torch.Generator().manual_seed(0)
    drawn = Transformer(model)
    initialise(drawn, generator)
    made: dict[str, Tensor] = drawn.state_dict()
    sources = []
    for name, shape in sorted(expected_shapes(model).items()):
        if name not in kept:
            is_table = name in model.table_names
            load = (
                partial(_table_parts, shape, dtype, generator)
                if is_table
                else partial(made.pop, name)
            )
            kept[name] = TensorSource(name, shape, dtype, load)
        sources.append(kept[name])
    save_checkpoint(target, replace(imported.config, model=model), sources, imported.extra_files)


def with_memory(model: ModelConfig, num_subkeys: int, source: Path) -> ModelConfig:
    """The shape of that variant."""
    if model.num_layers <= MEMORY_LAYERS or set(model.feed_forward) & set(MEMORY_KINDS):
        raise CheckpointError(f"{source}: takes more than 3 layers, none of them of memory")
    kinds = list(model.feed_forward)
    for i in range(MEMORY_LAYERS):
        kinds[(i + 1) * model.num_layers // (MEMORY_LAYERS + 1)] = "memory_plus"
    width = model.hidden_size
    memory = MemoryConfig(
        num_heads=NUM_HEADS,
        num_subkeys=num_subkeys,
        top_k=TOP_K,
        query_dim=width // 4 * 2,
        value_dim=width,
    )
    return replace(model, feed_forward=tuple(kinds), memory=memory)


def _table_parts(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Tensor]:
    """The same rows again and again, some at a time: a table may be larger than memory."""
    drawn_RV = torch.empty(min(shape[0], _DRAWN_ROWS), shape[1])
    initialise_table(drawn_RV, generator)
    drawn_RV = drawn_RV.to(dtype)
    for first in range(0, shape[0], len(drawn_RV)):
        yield drawn_RV[: shape[0] - first]
