"""Memory lookups as kernel cases: top-K of scores, weighted rows, and dot products."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from benchmarks.drawn_tables import PLAIN, drawn_rows
from benchmarks.gpu.drawn_models import GPU
from benchmarks.gpu.kernel_inputs import KernelCase, KernelInputs
from benchmarks.memory_variant import NUM_HEADS, TOP_K
from memory_ops import reference
from memory_ops.checks import Table
from memory_ops.patches.device_patches import DevicePatches
from memory_ops.patches.patched_rows import PatchedRows
from memory_ops.patches.token_patches import PatchUse, TokenPatches
from memory_ops.row_formats import RowFormat, RowRecords


def lookup_cases(width: int, num_subkeys: int, num_tokens: int) -> Iterator[KernelCase]:
    """Lookups of N subkeys per half and rows of this width, in every format."""
    from memory_ops import triton_kernels

    yield KernelCase(
        f"top-K of 2 x {num_subkeys}",
        triton_kernels.product_topk,
        reference.product_topk,
        partial(_scores, num_subkeys, num_tokens),
    )
    for dtype in ("bf16", "int8", "int4", "fp8"):
        yield KernelCase(
            f"weighted rows {dtype}",
            triton_kernels.gather_rows,
            reference.gather_rows,
            partial(_gather, width, dtype, num_tokens),
        )
    yield KernelCase(
        "row dots bf16",
        triton_kernels.row_dots,
        reference.row_dots,
        partial(_dots, width, num_tokens),
    )
    yield KernelCase(
        "row patches bf16",
        _add_device_patches,
        _add_patched_rows,
        partial(_patched, width, num_tokens),
    )


def _add_device_patches(
    out_TV: Tensor,
    rows_THK: Tensor,
    weights_THK: Tensor,
    patches: TokenPatches,
    on_device: DevicePatches,
) -> None:
    from memory_ops.triton_kernels.add_patched_rows import add_device_patches

    add_device_patches(out_TV, rows_THK, weights_THK, on_device)


def _add_patched_rows(
    out_TV: Tensor,
    rows_THK: Tensor,
    weights_THK: Tensor,
    patches: TokenPatches,
    on_device: DevicePatches,
) -> None:
    reference.add_patched_rows(out_TV, rows_THK, weights_THK, patches)


def _drawn_patches(width: int, count: int) -> Sequence[PatchedRows]:
    """Patches of rows that they share with no other patch."""
    num_rows = max(_PATCHED_ROWS, _PATCHES_BYTES // (2 * count * width))
    num_rows = min(num_rows, _NUM_ROWS // count)
    parts = torch.randperm(_NUM_ROWS)[: count * num_rows].view(count, -1).sort().values
    deltas = torch.randn(count, num_rows, width, device=GPU).bfloat16()
    return [PatchedRows(*pair).to(GPU) for pair in zip(parts, deltas, strict=True)]


def _patched(width: int, num_tokens: int) -> KernelInputs:
    """Every token uses a patch, which has 30 % of the rows that the token reads."""
    patches = _drawn_patches(width, min(num_tokens, _MOST_PATCHES))
    rows_THK = _rows(num_tokens)
    for token in range(num_tokens):
        own_P = patches[token % len(patches)].rows_P
        own_HK = own_P[torch.randint(len(own_P), rows_THK[token].shape, device=GPU)]
        is_own_HK = torch.rand(own_HK.shape, device=GPU) < _PATCHED_SHARE
        rows_THK[token] = torch.where(is_own_HK, own_HK, rows_THK[token])
    set_T = torch.arange(num_tokens, dtype=torch.int32) % len(patches)
    first_T = set_T.long().to(GPU)
    on_device = DevicePatches(
        torch.stack((first_T, first_T + 1), dim=1),
        torch.tensor([one.words.data_ptr() for one in patches], device=GPU),
        torch.full((len(patches),), 0.5, dtype=torch.float64, device=GPU),
        torch.tensor([num_tokens], device=GPU),
    )
    sets = TokenPatches([[PatchUse(one, 0.5)] for one in patches], set_T)
    out_TV, weights_THK = torch.randn(num_tokens, width, device=GPU), _weights(rows_THK)
    # each row reads at least one place of the index; those found, their id and deltas
    per_row = 4 + _PATCHED_SHARE * (8 + 2 * width)
    found_bytes = round(rows_THK.numel() * per_row)
    return KernelInputs(
        (out_TV, rows_THK, weights_THK, sets, on_device),
        num_bytes=found_bytes + 2 * out_TV.nbytes + rows_THK.nbytes + weights_THK.nbytes,
        outputs=(0,),
    )


def _scores(num_subkeys: int, num_tokens: int) -> KernelInputs:
    scores_TH2N = torch.randn(num_tokens, NUM_HEADS, 2, num_subkeys, device=GPU)
    return KernelInputs((scores_TH2N, TOP_K), num_bytes=scores_TH2N.nbytes)


def _gather(width: int, dtype: str, num_tokens: int) -> KernelInputs:
    table, row_bytes = _table(width, dtype)
    rows_THK = _rows(num_tokens)
    return KernelInputs(
        (table, rows_THK, _weights(rows_THK)), num_bytes=rows_THK.numel() * row_bytes
    )


def _dots(width: int, num_tokens: int) -> KernelInputs:
    table, row_bytes = _table(width, "bf16")
    rows_THK, x_TV = _rows(num_tokens), torch.randn(num_tokens, width, device=GPU)
    return KernelInputs((table, rows_THK, x_TV), num_bytes=rows_THK.numel() * row_bytes)


def _rows(num_tokens: int) -> Tensor:
    return torch.randint(_NUM_ROWS, (num_tokens, NUM_HEADS, TOP_K), device=GPU)


def _weights(rows_THK: Tensor) -> Tensor:
    return torch.rand(rows_THK.shape, device=GPU)


_NUM_ROWS = 2**15
_MOST_PATCHES, _PATCHED_ROWS, _PATCHED_SHARE = 8, 1000, 0.3
# at least, of the deltas of a call: those of 16 calls exceed an L2 cache
_PATCHES_BYTES = 2**23


def _table(width: int, dtype: str) -> tuple[Table, int]:
    """Rows on the device, more than its caches hold, and the bytes of a row."""
    part_PB = drawn_rows(dtype, width).to(GPU)
    rows_RB = part_PB.repeat(_NUM_ROWS // len(part_PB), 1)
    row_bytes = rows_RB[0].nbytes
    if dtype in PLAIN:
        return rows_RB, row_bytes
    return RowRecords(rows_RB, cast(RowFormat, dtype), width), row_bytes
