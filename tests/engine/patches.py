"""Random row patches for tests."""

from dataclasses import replace

import torch

from engine.model.layout import TokenLayout
from engine.model.row_patches import RowPatch, ScaledPatch, forward_patches
from memory_ops.patches.patched_rows import PatchedRows


def patch_of(model, seed: int, count: int = 30) -> RowPatch:
    """A patch of some rows of every table; its name is its seed."""
    drawn = torch.Generator().manual_seed(seed)
    rows_of = {}
    for name, table in model.tables.items():
        rows_P = torch.randperm(table.num_rows, generator=drawn)[:count].sort().values
        deltas_PV = torch.randn(count, table.value_dim, generator=drawn) * 2
        rows_of[name] = PatchedRows(rows_P, deltas_PV)
    config = model.config
    layers = {i: rows_of[config.layer_tables(i).values] for i in config.memory_layers}
    return RowPatch(f"{seed:064x}", layers)


def with_patches(layout: TokenLayout, model) -> TokenLayout:
    """A step whose sequences use no patch, one or two, in turn."""
    first, second = (patch_of(model, seed, count=40) for seed in (1, 2))
    sets = [(), (ScaledPatch(first, 1.0),), (ScaledPatch(first, 0.5), ScaledPatch(second, -2.0))]
    starts = layout.query_starts
    of_sequences = [sets[s % 3] for s in range(1, len(starts))]
    return replace(layout, patches=forward_patches(of_sequences, starts))
