"""Draws row patches: random rows, or a share of the rows that given tokens read."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from engine.model.layout import TokenLayout
from engine.model.row_patches import RowPatch
from engine.model.transformer import Transformer
from memory_ops.patches.patched_rows import PatchedRows

# so small that answers stay the same, and with them the rows that they read
_DELTA = 1e-6


@torch.no_grad()
def read_rows(model: Transformer, ids: Sequence[int], first: int) -> dict[str, Tensor]:
    """The reads of each table by the tokens of a text from ``first`` on, int64 row ids."""
    device = model.model.embed_tokens.weight.device
    ids_T = torch.tensor(ids, device=device)
    positions_T = torch.arange(len(ids), device=device)
    out = model(ids_T, TokenLayout(positions_T, (0, len(ids))), positions_T[-1:], with_trace=True)
    reads: dict[str, list[Tensor]] = {name: [] for name in model.tables}
    for layer, trace in out.memory.items():
        reads[model.config.layer_tables(layer).values].append(
            trace.rows_THK[first:].flatten().cpu()
        )
    return {name: torch.cat(parts) for name, parts in reads.items()}


def drawn_patch(
    number: int, model: Transformer, reads: Mapping[str, Tensor], num_rows: int, share: float
) -> RowPatch:
    """A patch of ``num_rows`` rows in all, the same number of each table, with bf16 deltas.

    The rows that ``reads`` has most often come first, until they have this share of the reads.
    The others are drawn. ``number`` is the seed and the name.
    """
    shapes = {name: (table.num_rows, table.value_dim) for name, table in model.tables.items()}
    first = {name: _most_read(read, share) for name, read in reads.items()}
    tables = drawn_tables(number, shapes, num_rows, first)
    rows_of = {name: PatchedRows(*pair) for name, pair in tables.items()}
    config = model.config
    layers = {layer: rows_of[config.layer_tables(layer).values] for layer in config.memory_layers}
    return RowPatch(f"{number:064x}", layers).to(model.model.embed_tokens.weight.device)


def drawn_tables(
    seed: int,
    shapes: Mapping[str, tuple[int, int]],
    num_rows: int,
    first: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, tuple[Tensor, Tensor]]:
    """Ids and bf16 deltas of ``num_rows`` rows in all, the same number of each table.

    Args:
        shapes: R and V of each table; each must have enough rows.
        first: rows of tables that come before drawn ones.
    """
    generator = torch.Generator().manual_seed(seed)
    count, tables = num_rows // len(shapes), {}
    for name, (table_rows, value_dim) in shapes.items():
        assert 1 <= count <= table_rows, (name, count, table_rows)
        rows_P = torch.randperm(table_rows, generator=generator)
        if name in first:
            rows_P = torch.cat([first[name], rows_P[~torch.isin(rows_P, first[name])]])
        deltas_PV = torch.randn(count, value_dim, generator=generator) * _DELTA
        tables[name] = rows_P[:count].sort().values, deltas_PV.bfloat16()
    return tables


def _most_read(reads: Tensor, share: float) -> Tensor:
    """The fewest rows that have this share of the reads, at least one."""
    rows, counts = torch.unique(reads, return_counts=True)
    counts, order = counts.sort(descending=True, stable=True)
    enough = int((counts.cumsum(0) < share * len(reads)).sum()) + 1
    most_read: Tensor = rows[order[:enough]]
    return most_read
