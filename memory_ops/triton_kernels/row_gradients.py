"""The table gradient of ``gather_rows`` as a Triton kernel: one program per distinct row.

Shape suffixes: T tokens, H memory heads, K rows read per head, L = T * H * K lookups, U distinct
rows among them, V value width.
"""

# triton and its kernels are untyped
# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_ops.checks import check_gradients
from memory_ops.triton_kernels.launch import RowLaunch, constant_row_stride, on_device_of
from memory_ops.triton_kernels.table_view import ValueKind, value_kind

# by the kind of the gradient's values
GRADIENT_LAUNCHES: dict[ValueKind, RowLaunch] = {
    "fp32": RowLaunch(rows=8, columns=128),
    "fp16": RowLaunch(rows=8, columns=256),
    "bf16": RowLaunch(rows=8, columns=256),
}


def row_gradients(rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``gather_rows`` in its table: of the rows that were read.

        grad_row[r] = sum of weights[t,h,k] * grad[t] over all (t, h, k) that read r

    The kernel sorts lookups by row. One program sums the lookups of a row in order, without
    atomics, so the same input gives the same bits. A row with very many lookups is slow, because
    one program sums it. The call waits for the device once, because U is a shape. Not timed on a
    GPU.

    Args:
        rows_THK: row ids, int64, ``[T, H, K]``.
        weights_THK: one weight per row, floating, ``[T, H, K]``.
        grad_TV: the gradient of the gathered sums, fp32, fp16 or bf16, ``[T, V]``.

    Returns:
        The U distinct rows read, int64 ``[U]`` in ascending order, and their gradients, fp32
        ``[U, V]``.

    Raises:
        ValueError: the shapes do not match, or the gradient has another dtype.
    """
    check_gradients(rows_THK, weights_THK, grad_TV)
    kind = value_kind("grad", grad_TV)
    grad_TV = grad_TV if grad_TV.stride(1) == 1 else grad_TV.contiguous()
    # stable, so that lookups of a row keep their order
    sorted_L, order_L = rows_THK.flatten().sort(stable=True)
    rows_U, counts_U = sorted_L.unique_consecutive(return_counts=True)
    sums_UV = torch.empty(
        (len(rows_U), grad_TV.shape[1]), dtype=torch.float32, device=grad_TV.device
    )
    if sums_UV.numel():
        launch = GRADIENT_LAUNCHES[kind]
        per_token = rows_THK.shape[1] * rows_THK.shape[2]
        _launch(launch, order_L, counts_U, weights_THK, grad_TV, per_token, sums_UV)
    return rows_U, sums_UV


def _launch(
    launch: RowLaunch,
    order_L: Tensor,
    counts_U: Tensor,
    weights_THK: Tensor,
    grad_TV: Tensor,
    per_token: int,
    sums_UV: Tensor,
) -> None:
    num_rows, value_dim = sums_UV.shape
    with on_device_of(sums_UV):
        _sum_segments[(num_rows, triton.cdiv(value_dim, launch.columns))](
            order_L,
            counts_U,
            counts_U.cumsum(0),
            weights_THK.contiguous(),
            grad_TV,
            sums_UV,
            VALUE_DIM=value_dim,
            GRAD_STRIDE=constant_row_stride(grad_TV),
            PER_TOKEN=per_token,
            ROWS=launch.rows,
            BLOCK=launch.columns,
            **launch.options(),
        )


@triton.jit
def _sum_segments(
    order_ptr,
    counts_ptr,
    ends_ptr,
    weights_ptr,
    grad_ptr,
    sums_ptr,
    VALUE_DIM: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums[u, v] = sum over i in segment u of weights[l] * grad[l // (H * K), v], l = order[i].

    Segment u is [ends[u] - counts[u], ends[u]).
    """
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < VALUE_DIM
    end = tl.load(ends_ptr + segment)
    begin = end - tl.load(counts_ptr + segment)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(begin, end, ROWS):
        places = start + tl.arange(0, ROWS)
        live = places < end
        lookups = tl.load(order_ptr + places, mask=live, other=0)
        weights = tl.load(weights_ptr + lookups, mask=live, other=0.0)
        grads = tl.load(
            grad_ptr + (lookups // PER_TOKEN)[:, None] * GRAD_STRIDE + columns[None, :],
            mask=live[:, None] & in_row[None, :],
            other=0.0,
        )
        sums += tl.sum(weights.to(tl.float32)[:, None] * grads.to(tl.float32), axis=0)
    tl.store(sums_ptr + segment * VALUE_DIM + columns, sums, mask=in_row)
