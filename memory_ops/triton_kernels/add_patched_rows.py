"""Adds row patches to sums of rows, as a Triton kernel: one program per token.

Not timed on a GPU. Shape suffixes: T tokens, H memory heads, K rows read per head, C = H * K
choices of a token, V value width, U uses of patches.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.checks import check_patches
from memory_ops.patches import patched_rows
from memory_ops.patches.device_patches import DevicePatches
from memory_ops.patches.token_patches import NO_SET, TokenPatches
from memory_ops.triton_kernels.launch import RowLaunch, on_device_of

# of rows that fill loads of 128 bits, and of others; many warps, because a program reads all
# deltas of its token
WIDE_LAUNCH = RowLaunch(rows=32, columns=512, num_warps=8)
NARROW_LAUNCH = RowLaunch(rows=32, columns=64, num_warps=8)

# words of ``PatchedRows.words``
_ROWS = tl.constexpr(patched_rows.ROWS)
_DELTAS = tl.constexpr(patched_rows.DELTAS)
_INDEX = tl.constexpr(patched_rows.INDEX)
_COUNTS = tl.constexpr(patched_rows.COUNTS)
_FACTOR = tl.constexpr(patched_rows.FACTOR)
_INDEX_BITS = tl.constexpr(patched_rows.INDEX_BITS)
_IS_BF16 = tl.constexpr(patched_rows.IS_BF16)


def add_patched_rows(
    out_TV: Tensor, rows_THK: Tensor, weights_THK: Tensor, patches: TokenPatches
) -> None:
    """See ``memory_ops.operations.add_patched_rows``. It copies the numbers of the sets.

    Args:
        out_TV: fp32, contiguous.
        patches: on the device of the sums.

    Raises:
        ValueError: the shapes do not match, or a patch is on another device.
    """
    check_patches(out_TV, rows_THK, weights_THK, patches)
    uses = list(itertools.chain.from_iterable(patches.sets))
    wrong = {use.patch.words.device for use in uses} - {out_TV.device}
    if wrong:
        raise ValueError(f"patches: expected rows on {out_TV.device}, got {wrong}")
    starts = torch.tensor([0, *itertools.accumulate(map(len, patches.sets))])
    set_T = patches.set_T.long()
    spans_T2 = torch.stack((starts[set_T], starts[set_T + 1]), dim=1)
    spans_T2.masked_fill_((set_T == NO_SET)[:, None], 0)
    addresses_U = torch.tensor([use.patch.words.data_ptr() for use in uses], dtype=torch.int64)
    scales_U = torch.tensor([use.scale for use in uses], dtype=torch.float64)
    found = spans_T2, addresses_U, scales_U, torch.tensor([len(set_T)])
    on_device = DevicePatches(*(tensor.to(out_TV.device) for tensor in found))
    add_device_patches(out_TV, rows_THK, weights_THK, on_device)


def add_device_patches(
    out_TV: Tensor, rows_THK: Tensor, weights_THK: Tensor, patches: DevicePatches
) -> None:
    """``add_patched_rows`` of patches whose numbers are on the device.

    Never waits for the device, and branches on shapes alone, so CUDA graphs can capture it. Spans
    and addresses are not checked: wrong ones read memory out of bounds. The caller keeps the
    patches until the kernel has run. A token's sum does not depend on the other tokens.
    """
    assert out_TV.dtype is torch.float32 and out_TV.is_contiguous()
    num_tokens, value_dim = out_TV.shape
    num_choices = rows_THK.shape[1] * rows_THK.shape[2]
    rows_TC = rows_THK.reshape(num_tokens, num_choices).contiguous()
    weights_TC = weights_THK.reshape(num_tokens, num_choices).contiguous()
    if not out_TV.numel() or not len(patches.addresses_U):
        return
    is_wide = value_dim % 8 == 0
    launch = WIDE_LAUNCH if is_wide else NARROW_LAUNCH
    with on_device_of(out_TV):
        _add_patched_rows[(num_tokens,)](
            out_TV,
            rows_TC,
            weights_TC,
            patches.spans_T2,
            patches.addresses_U,
            patches.scales_U,
            patches.num_counted_1,
            num_choices,
            VALUE_DIM=value_dim,
            IS_WIDE=is_wide,
            ROWS=launch.rows,
            BLOCK=launch.columns,
            **launch.options(),
        )


@triton.jit
def _add_patched_rows(
    out_ptr,
    rows_ptr,
    weights_ptr,
    spans_ptr,
    addresses_ptr,
    scales_ptr,
    num_counted_ptr,
    num_choices,
    VALUE_DIM: tl.constexpr,
    IS_WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t, v] += sum over uses, over c of scale * weights[t, c] * delta[rows[t, c], v]."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.load(spans_ptr + 2 * token)
    last = tl.load(spans_ptr + 2 * token + 1)
    # most tokens use no patch: their programs end here
    if first < last:
        is_counted = token < tl.load(num_counted_ptr)
        for use in range(first, last):
            address = tl.load(addresses_ptr + use)
            if address != 0:
                _add_use(
                    out_ptr + token * VALUE_DIM,
                    address.to(tl.pointer_type(tl.int64)),
                    tl.load(scales_ptr + use).to(tl.float32),
                    rows_ptr + token * num_choices,
                    weights_ptr + token * num_choices,
                    num_choices,
                    is_counted,
                    VALUE_DIM,
                    IS_WIDE,
                    ROWS,
                    BLOCK,
                )


@triton.jit
def _add_use(
    out_ptr,
    words_ptr,
    scale,
    rows_ptr,
    weights_ptr,
    num_choices,
    is_counted,
    VALUE_DIM: tl.constexpr,
    IS_WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add one use of a patch to a token's sums; each row is looked up once."""
    patch_rows_ptr = tl.load(words_ptr + _ROWS).to(tl.pointer_type(tl.int64))
    index_ptr = tl.load(words_ptr + _INDEX).to(tl.pointer_type(tl.int32))
    deltas = tl.load(words_ptr + _DELTAS)
    factor, bits = tl.load(words_ptr + _FACTOR), tl.load(words_ptr + _INDEX_BITS)
    is_bf16 = tl.load(words_ptr + _IS_BF16) != 0
    hits = 0
    for start in range(0, num_choices, ROWS):
        choices = start + tl.arange(0, ROWS)
        live = choices < num_choices
        rows = tl.load(rows_ptr + choices, mask=live, other=0)
        numbers = _numbers(rows, live, patch_rows_ptr, index_ptr, factor, bits)
        found = numbers >= 0
        num_found = tl.sum(found.to(tl.int32), axis=0)
        hits += num_found
        if num_found > 0:
            weights = tl.load(weights_ptr + choices, mask=found, other=0.0).to(tl.float32) * scale
            if is_bf16:
                narrow_ptr = deltas.to(tl.pointer_type(tl.bfloat16))
                _add_deltas(out_ptr, narrow_ptr, numbers, weights, VALUE_DIM, IS_WIDE, BLOCK)
            else:
                wide_ptr = deltas.to(tl.pointer_type(tl.float32))
                _add_deltas(out_ptr, wide_ptr, numbers, weights, VALUE_DIM, IS_WIDE, BLOCK)
            # the sums that one thread stored another one may load next
            tl.debug_barrier()
    if is_counted:
        counts_ptr = tl.load(words_ptr + _COUNTS).to(tl.pointer_type(tl.int64))
        tl.atomic_add(counts_ptr, tl.cast(num_choices, tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 1, tl.cast(hits, tl.int64), sem="relaxed")


@triton.jit
def _numbers(rows, live, patch_rows_ptr, index_ptr, factor, bits):
    """The number of each row in the patch, or -1; see ``PatchedRows.index_I``."""
    mask = (tl.cast(1, tl.int64) << bits) - 1
    # the mask also removes the bits of the sign
    places = (rows * factor) >> (64 - bits) & mask
    numbers = tl.full(rows.shape, -1, dtype=tl.int32)
    searching = live
    more = tl.max(searching.to(tl.int32), axis=0) != 0
    while more:
        found = tl.load(index_ptr + places, mask=searching, other=-1)
        searching = searching & (found >= 0)
        row = tl.load(patch_rows_ptr + found, mask=searching, other=-1)
        numbers = tl.where(searching & (row == rows), found, numbers)
        searching = searching & (row != rows)
        places = (places + 1) & mask
        more = tl.max(searching.to(tl.int32), axis=0) != 0
    return numbers


@triton.jit
def _add_deltas(
    out_ptr,
    deltas_ptr,
    numbers,
    weights,
    VALUE_DIM: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the weighted deltas of some rows to the sums; numbers below 0 add nothing."""
    begins = numbers.to(tl.int64) * VALUE_DIM
    for first in range(0, VALUE_DIM, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < VALUE_DIM
        pointers = deltas_ptr + (begins[:, None] + columns[None, :])
        if IS_WIDE:
            # tiles begin at multiples of 16 bytes, as allocations on a GPU do: loads of 128 bits
            pointers = tl.multiple_of(pointers, (1, 16))
        mask = (numbers >= 0)[:, None] & inside[None, :]
        values = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        sums = tl.sum(weights[:, None] * values, axis=0)
        sums += tl.load(out_ptr + columns, mask=inside, other=0.0)
        tl.store(out_ptr + columns, sums, mask=inside)
