"""Checks of the operations' inputs, the same for every backend."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from memory_ops.patches.token_patches import TokenPatches
from memory_ops.row_formats import RowRecords
from memory_ops.sparse_adam import AdamMoments, RowGroups

# rows of any floating dtype, or records of 8 or 4 bits a value
Table = Tensor | RowRecords
FLOATS = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of ``dtype`` values use: fp32, or fp64 for fp64 input."""
    return torch.promote_types(dtype, torch.float32)


def table_shape(table: Table) -> tuple[int, int]:
    """R and V.

    Raises:
        ValueError: the table is neither records nor a floating-point matrix.
    """
    if isinstance(table, RowRecords):
        return table.records_RB.shape[0], table.value_dim
    shape = table.shape
    if len(shape) != 2 or table.dtype not in FLOATS:
        found = f"{table.dtype} {tuple(shape)}"
        raise ValueError(f"table: expected a floating-point [R, V] tensor, got {found}")
    return shape[0], shape[1]


def check_scores(half_scores_TH2N: Tensor, top_k: int) -> None:
    """Raise ValueError unless the scores are ``[T, H, 2, N]`` and ``top_k`` is 1 to N."""
    if half_scores_TH2N.dtype not in (torch.float32, torch.float64):
        # rounding to a narrower dtype changes which rows are chosen
        raise ValueError(f"half_scores: expected float32 or float64, got {half_scores_TH2N.dtype}")
    if half_scores_TH2N.dim() != 4 or half_scores_TH2N.shape[2] != 2:
        shape = tuple(half_scores_TH2N.shape)
        raise ValueError(f"half_scores: expected [T, H, 2, N], got {shape}")
    num_subkeys = half_scores_TH2N.shape[3]
    if not 1 <= top_k <= num_subkeys:
        raise ValueError(f"top_k: {top_k} is outside [1, {num_subkeys}], the subkeys of one half")


def check_rows(table: Table, rows_THK: Tensor, weights_THK: Tensor) -> None:
    """Raise ValueError unless table, rows and weights match in shape, dtype and device."""
    table_shape(table)
    check_references(rows_THK, weights_THK)
    _check_devices(table, rows_THK, weights_THK)


def check_no_gradient(name: str, operand: Tensor, place: str) -> None:
    """Raise ValueError if an operand needs a gradient; ``place`` says where the table is."""
    if operand.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: tables {place} do not support gradients")


def reject_tangents(*operands: Table) -> None:
    """Raise RuntimeError if an operand has a tangent, of a forward-mode derivative."""
    # torch's custom operators silently drop the tangents of tensors that need no gradient
    for operand in operands:
        if isinstance(operand, RowRecords):
            continue
        if forward_ad.unpack_dual(operand).tangent is not None:  # type: ignore[no-untyped-call]
            raise RuntimeError("memory_ops: forward-mode derivatives are not supported")


def check_vectors(table: Table, rows_THK: Tensor, x_TV: Tensor) -> None:
    """Raise ValueError unless table, rows and one vector per token match."""
    value_dim = table_shape(table)[1]
    if rows_THK.dim() != 3 or x_TV.shape != (rows_THK.shape[0], value_dim):
        shapes = f"{tuple(rows_THK.shape)} and {tuple(x_TV.shape)}"
        raise ValueError(f"rows and x: expected [T, H, K] and [T, {value_dim}], got {shapes}")
    _check_ids(rows_THK)
    _check_floats("x", x_TV)
    _check_devices(table, rows_THK, x_TV)


def check_gradients(rows_THK: Tensor, weights_THK: Tensor, grad_TV: Tensor) -> None:
    """Raise ValueError unless rows, weights and one gradient per token match."""
    check_references(rows_THK, weights_THK)
    if grad_TV.dim() != 2 or grad_TV.shape[0] != rows_THK.shape[0]:
        shapes = f"{tuple(grad_TV.shape)} for {rows_THK.shape[0]} tokens"
        raise ValueError(f"grad: expected [T, V], got {shapes}")
    _check_floats("grad", grad_TV)
    if not rows_THK.device == weights_THK.device == grad_TV.device:
        found = f"{rows_THK.device}, {weights_THK.device} and {grad_TV.device}"
        raise ValueError(f"rows, weights and grad: expected one device, got {found}")


def check_references(rows_THK: Tensor, weights_THK: Tensor) -> None:
    """Raise ValueError unless rows and weights have one shape and valid dtypes."""
    shape = rows_THK.shape
    if len(shape) != 3 or shape != weights_THK.shape:
        shapes = f"{tuple(shape)} and {tuple(weights_THK.shape)}"
        raise ValueError(f"rows and weights: expected the same shape [T, H, K], got {shapes}")
    _check_ids(rows_THK)
    _check_floats("weights", weights_THK)


def check_patches(
    out_TV: Tensor, rows_THK: Tensor, weights_THK: Tensor, patches: TokenPatches
) -> None:
    """Raise ValueError unless sums, rows, weights and patches are those of the same tokens."""
    check_references(rows_THK, weights_THK)
    if out_TV.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sums: expected float32 or float64, got {out_TV.dtype}")
    num_tokens = len(rows_THK)
    if out_TV.dim() != 2 or len(out_TV) != num_tokens or patches.set_T.shape != (num_tokens,):
        found = f"{tuple(out_TV.shape)} and {tuple(patches.set_T.shape)} for {num_tokens} tokens"
        raise ValueError(f"sums and patches: expected [T, V] and [T], got {found}")
    widths = {use.patch.deltas_PV.shape[1] for uses in patches.sets for use in uses}
    if widths - {out_TV.shape[1]}:
        raise ValueError(f"patches: expected deltas of {out_TV.shape[1]} values, got {widths}")


def check_groups(groups: RowGroups, grad_TV: Tensor) -> None:
    """Raise ValueError unless every token of the groups has a gradient.

    Tokens are checked on the CPU only: elsewhere the check would wait for the device.
    """
    if grad_TV.dim() != 2:
        raise ValueError(f"grad: expected [T, V], got {tuple(grad_TV.shape)}")
    _check_floats("grad", grad_TV)
    if groups.tokens_L.device != grad_TV.device:
        found = f"{groups.tokens_L.device} and {grad_TV.device}"
        raise ValueError(f"groups and grad: expected one device, got {found}")
    if not grad_TV.is_cpu:
        return
    if len(groups.tokens_L) and int(groups.tokens_L.max()) >= len(grad_TV):
        most = int(groups.tokens_L.max())
        raise ValueError(f"grad: token {most} needs a gradient, got {len(grad_TV)} gradients")


def check_adam(table_RV: Tensor, moments: AdamMoments, groups: RowGroups, grad_TV: Tensor) -> None:
    """Check that table, moments and gradients match.

    Raises:
        ValueError: the table is not a contiguous float32 or float64 matrix, or a moment or gradient
            does not match its shape or dtype.
        IndexError: a row lies outside the table; checked on the CPU only.
    """
    check_groups(groups, grad_TV)
    shape, dtype = table_shape(table_RV), table_RV.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"table: expected float32 or float64, got {dtype}")
    if grad_TV.shape[1] != shape[1]:
        raise ValueError(f"grad: expected [T, {shape[1]}], got {tuple(grad_TV.shape)}")
    first_RV, second = moments
    # two moments per value may be narrower than an fp32 table
    is_narrow = first_RV is not None and dtype is torch.float32 and second.dtype is torch.bfloat16
    kept = torch.bfloat16 if is_narrow else dtype
    wanted = (
        {"second": (second, shape[:1])}
        if first_RV is None
        else {
            "first": (first_RV, shape),
            "second": (second, shape),
        }
    )
    for name, (moment, of_shape) in wanted.items():
        if moment.shape != of_shape or moment.dtype is not kept:
            found = f"{moment.dtype} {tuple(moment.shape)}"
            raise ValueError(f"{name} moment: expected {kept} {of_shape}, got {found}")
    tensors = [t for t in (table_RV, first_RV, second) if t is not None]
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError("table and moments: expected contiguous tensors")
    devices = {t.device for t in (*tensors, grad_TV)}
    if len(devices) > 1:
        raise ValueError(f"table, moments and grad: expected one device, got {devices}")
    if not grad_TV.is_cpu:
        return
    if len(groups.rows_U) and int(groups.rows_U.max()) >= shape[0]:
        raise IndexError(f"rows: {int(groups.rows_U.max())} is outside [0, {shape[0]})")


def _check_floats(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        wanted = "float64, float32, float16 or bfloat16"
        raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype}")


def _check_devices(table: Table, rows: Tensor, other: Tensor) -> None:
    memory = table.records_RB if isinstance(table, RowRecords) else table
    if memory.is_cpu and rows.is_cpu and other.is_cpu:
        return
    # a GPU can read a table in pinned host memory
    pinned = memory.is_cpu and other.is_cuda
    if rows.device != other.device or not (pinned or memory.device == other.device):
        found = f"{memory.device}, {rows.device} and {other.device}"
        raise ValueError(f"table, rows and operand: expected one device, got {found}")


def _check_ids(rows_THK: Tensor) -> None:
    if rows_THK.dtype != torch.int64:
        raise ValueError(f"rows: expected int64 row ids, got {rows_THK.dtype}")
