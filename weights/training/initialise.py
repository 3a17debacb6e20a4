"""Initialises the weights of a new model and its tables."""

import torch
from torch import Tensor, nn

from engine.model.memory_layer import MemoryLayer
from engine.model.norm import RmsNorm
from engine.model.transformer import Transformer
from memory_ops.tables.table_shard import TableShard

_DRAWN_NUMBERS = 2**20


@torch.no_grad()
def initialise(model: Transformer, generator: torch.Generator) -> None:
    """Initialise all parameters of a model; ``initialise_table`` does its tables.

    A matrix with I inputs is N(0, 1 / I). For L layers, the 2 L matrices that end a residual branch
    are divided by sqrt(2 L). Memory layers follow "Memory Layers at Scale" (arXiv 2412.09764):
    subkeys U(+-1 / sqrt(k)), query Xavier uniform. Norms are 1, biases 0. A memory beside a
    feed-forward adds 0 at first: its scalar gate is 0, or its value projection if it has no such
    gate. Other scalar gates are 1.

    Raises:
        ValueError: a memory beside a feed-forward has neither.
    """
    check_starts(model)
    branches = 2 * model.config.num_layers
    for name, module in model.named_modules():
        if isinstance(module, RmsNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            _fill_normal(module.weight, module.weight.shape[1], generator)
        elif isinstance(module, nn.Linear):
            ends_branch = name.endswith(("o_proj", "down_proj", "w2"))
            inputs = module.weight.shape[1] * (branches if ends_branch else 1)
            _fill_normal(module.weight, inputs, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in model.layers:
        if layer.memory is not None:
            is_beside = layer.feed_forward is not None
            _initialise_memory(layer.memory, generator, is_beside=is_beside)


def check_starts(model: Transformer) -> None:
    """Raise ValueError if a memory with placement ``beside`` cannot start with an output of 0."""
    for layer in model.layers:
        memory = layer.memory
        if memory is None or layer.feed_forward is None:
            continue
        if memory.scalar_gate is None and memory.value_proj is None:
            raise ValueError(
                f"memory.placement: layer {memory.index} has no value projection that could be 0"
                " at first; set scalar_gate"
            )


@torch.no_grad()
def initialise_table(table_RV: Tensor, generator: torch.Generator) -> None:
    """Initialise a table's rows as N(0, 1 / V)."""
    _fill_normal(table_RV, table_RV.shape[1], generator)


@torch.no_grad()
def initialise_part(part: Tensor, shard: TableShard, generator: torch.Generator) -> None:
    """Initialise a process's part of a table with the values that ``initialise_table`` gives it.

    Draws the numbers of the whole table, some rows at a time.
    """
    num_rows, width = shard.shape
    # torch draws normal numbers in groups of 16, and the last ones apart
    step = max(_DRAWN_NUMBERS // (16 * width), 1) * 16
    first = 0
    while first < num_rows:
        count = step if num_rows - first >= step + 16 else num_rows - first
        rows = torch.empty(count, width)
        _fill_normal(rows, width, generator)
        if shard.axis == 1:
            part[first : first + count] = shard.part_of(rows)
        else:
            begin, end = max(first, shard.first), min(first + count, shard.first + shard.size)
            if begin < end:
                part[begin - shard.first : end - shard.first] = rows[begin - first : end - first]
        first += count


@torch.no_grad()
def initialise_subkeys(subkeys_H2Nk: Tensor, generator: torch.Generator) -> None:
    """Initialise the subkeys of a memory layer, ``[H, 2, N, k / 2]``, as U(+-1 / sqrt(k))."""
    bound = (2 * subkeys_H2Nk.shape[3]) ** -0.5
    subkeys_H2Nk.uniform_(-bound, bound, generator=generator)


def _initialise_memory(memory: MemoryLayer, generator: torch.Generator, *, is_beside: bool) -> None:
    nn.init.xavier_uniform_(memory.query.weight, generator=generator)
    initialise_subkeys(memory.subkeys, generator)
    if memory.query_norm is not None:
        nn.init.ones_(memory.query_norm)
    if memory.scalar_gate is not None:
        nn.init.constant_(memory.scalar_gate, 0.0 if is_beside else 1.0)
    elif is_beside and memory.value_proj is not None:
        nn.init.zeros_(memory.value_proj.weight)


def _fill_normal(weight: Tensor, inputs: int, generator: torch.Generator) -> None:
    weight.normal_(std=inputs**-0.5, generator=generator)
