"""Merges and scales row patches, which are linear: deltas of one row add up."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weights.errors import PatchError
from weights.patches.patch_folder import StoredPatch, stored_patch


def merged(patches: Sequence[StoredPatch]) -> StoredPatch:
    """One patch with the sum of several: their rows united, deltas added in fp32, in order.

    A table's deltas stay bf16 if those of all patches are bf16 and the sums need no rounding;
    otherwise they are fp32. The base patches of all are united.

    Raises:
        PatchError: two patches were made for different weights or tables (the message names both
            hashes or shapes), or a sum overflows.
    """
    first = patches[0].description
    origins, shapes = dict(first.origins), dict(first.shapes)
    base_patches: dict[str, list[str]] = {}
    for patch in patches:
        for name, hashes in patch.description.base_patches.items():
            base_patches[name] = list(dict.fromkeys((*base_patches.get(name, ()), *hashes)))
    for patch in patches[1:]:
        other = patch.description
        _check_same("row_choice", first.row_choice, other.row_choice)
        for name, origin in other.origins.items():
            _check_same(f"origins.{name}", origins.setdefault(name, origin), origin)
            shape = other.shapes[name]
            _check_same(f"shapes.{name}", list(shapes.setdefault(name, shape)), list(shape))
    tables = {}
    for name in shapes:
        tables[name] = _sum([patch.tables[name] for patch in patches if name in patch.tables])
    settings = {"command": "merge", "patches": [patch.content_hash for patch in patches]}
    description = replace(
        first,
        origins=origins,
        shapes=shapes,
        base_patches=base_patches,
        data=None,
        settings=settings,
        scores={},
    )
    return stored_patch(description, tables)


def scaled(patch: StoredPatch, factor: float) -> StoredPatch:
    """The patch with all deltas multiplied by a factor, in fp32.

    A table's deltas stay bf16 if the products need no rounding; otherwise they are fp32.

    Raises:
        PatchError: the factor is not finite, or a product overflows.
    """
    if not math.isfinite(factor):
        raise PatchError(f"factor: must be finite, not {factor}")
    tables = {
        name: (rows, _narrowed(deltas.float() * factor, deltas.dtype))
        for name, (rows, deltas) in patch.tables.items()
    }
    settings = {"command": "scale", "patches": [patch.content_hash], "factor": factor}
    return stored_patch(replace(patch.description, settings=settings, scores={}), tables)


def _sum(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Rows and deltas of one table's sum."""
    rows_P = torch.unique(torch.cat([rows for rows, _ in parts]))
    sums_PV = torch.zeros(len(rows_P), parts[0][1].shape[1])
    for rows, deltas in parts:
        # rows of one part are unique, so each sum gets one addend at a time, in order
        sums_PV[torch.searchsorted(rows_P, rows)] += deltas.float()
    is_narrow = all(deltas.dtype == torch.bfloat16 for _, deltas in parts)
    return rows_P, _narrowed(sums_PV, torch.bfloat16 if is_narrow else torch.float32)


def _narrowed(deltas_PV: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 deltas as ``dtype`` if that needs no rounding."""
    narrow_PV = deltas_PV.to(dtype)
    return narrow_PV if torch.equal(narrow_PV.float(), deltas_PV) else deltas_PV


def _check_same(field: str, first: object, other: object) -> None:
    if first != other:
        raise PatchError(
            f"{field}: the patches were made for different models: {first} and {other}"
        )
