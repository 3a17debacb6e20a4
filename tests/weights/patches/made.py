"""Row patches and models to test with, whose sums are exact."""

import shutil
from pathlib import Path

import torch

from tests.weights.checkpoints.rewritten import rewrite_table
from weights.patches.description import PatchDescription
from weights.patches.model_identity import ModelIdentity, model_identity
from weights.patches.patch_folder import StoredPatch, stored_patch, write_patch

TABLE = "memory.table"
NUM_ROWS, WIDTH = 64, 24
IDENTITY = ModelIdentity({TABLE: "a" * 64}, "b" * 64, {TABLE: (NUM_ROWS, WIDTH)})


def exact(*shape: int, seed: int, limit: int = 63) -> torch.Tensor:
    """Nonzero multiples of 1/64 below 1: sums of two are exact in bf16, fp16 and fp32."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, limit + 1, shape, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (sizes * signs) / 64


def patch_of(
    model: ModelIdentity = IDENTITY,
    seed: int = 0,
    count: int = 9,
    dtype: torch.dtype = torch.float32,
    **described,
) -> StoredPatch:
    """A patch with exact deltas on random rows of each table."""
    tables = {}
    for name, (num_rows, value_dim) in model.shapes.items():
        generator = torch.Generator().manual_seed(seed)
        rows_P = torch.randperm(num_rows, generator=generator)[:count].sort().values
        tables[name] = rows_P, exact(count, value_dim, seed=seed).to(dtype)
    description = PatchDescription(model.origins, model.row_choice, model.shapes, **described)
    return stored_patch(description, tables)


def saved_patch(folder: Path, **options) -> StoredPatch:
    """Write a patch from ``patch_of`` to a folder."""
    patch = patch_of(**options)
    write_patch(folder, patch)
    return patch


def exact_model(source: Path, target: Path) -> ModelIdentity:
    """Copy a model folder, with a table of exact values that has neither checksum nor origin."""
    shutil.copytree(source, target)
    rewrite_table(target, lambda table_RV: exact(*table_RV.shape, seed=99), {"format": "pt"})
    return model_identity(target)
