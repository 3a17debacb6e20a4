"""Draws row patches that hold a share of the rows that given tokens read."""

from collections.abc import Mapping, Sequence

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
    generator = torch.Generator().manual_seed(number)
    rows_of = {}
    for name, table in model.tables.items():
        count = num_rows // len(model.tables)
        rows_P = _most_read(reads[name], share)[:count]
        drawn_R = torch.randperm(table.num_rows, generator=generator)
        others_P = drawn_R[~torch.isin(drawn_R, rows_P)][: count - len(rows_P)]
        rows_P = torch.cat([rows_P, others_P]).sort().values
        deltas_PV = torch.randn(len(rows_P), table.value_dim, generator=generator) * _DELTA
        rows_of[name] = PatchedRows(rows_P, deltas_PV.bfloat16())
    config = model.config
    layers = {layer: rows_of[config.layer_tables(layer).values] for layer in config.memory_layers}
    return RowPatch(f"{number:064x}", layers).to(model.model.embed_tokens.weight.device)


def _most_read(reads: Tensor, share: float) -> Tensor:
    """The fewest rows that have this share of the reads, at least one."""
    rows, counts = torch.unique(reads, return_counts=True)
    counts, order = counts.sort(descending=True, stable=True)
    enough = int((counts.cumsum(0) < share * len(reads)).sum()) + 1
    most_read: Tensor = rows[order[:enough]]
    return most_read
