"""Scores of product keys: each half of a query against the subkeys of its half."""

from typing import Protocol

import torch
from torch import Tensor, nn

from engine.ops.native.library import NativeOps
from engine.ops.native.packed_linear import PackedLinear, WeightRows
from engine.ops.norm import rms_norm


class KeyOwner(Protocol):
    """Who has ``[H, 2, N, k / 2]`` subkeys and, for normed queries, a weight for each half."""

    subkeys: nn.Parameter
    query_norm: nn.Parameter | None
    norm_eps: float


class ProductKeys:
    """The subkeys of a layer; it owns none of them, and sees weights assigned later."""

    def __init__(self, owner: KeyOwner) -> None:
        self.owner = owner
        self.packed: tuple[NativeOps, PackedLinear, tuple[int, ...]] | None = None

    def pack(self, native: NativeOps) -> PackedLinear:
        """Lay the subkeys out for these kernels, and give them up."""
        subkeys_H2Nk, query_norm = self.owner.subkeys, self.owner.query_norm
        num_subkeys = subkeys_H2Nk.shape[2]
        rows = [WeightRows(half, block=i) for i, half in enumerate(subkeys_H2Nk.flatten(0, 1))]
        norm = None if query_norm is None else (query_norm, self.owner.norm_eps)
        packed = native.pack(rows, num_subkeys, norm=norm, has_wide_outputs=True)
        self.packed = native, packed, (-1, *subkeys_H2Nk.shape[:3])
        assert isinstance(self.owner, nn.Module)
        self.owner.register_parameter("subkeys", None)
        return packed


def half_scores(q_TF: Tensor, keys: ProductKeys) -> Tensor:
    """Dot products of query halves, normed where they are to be, and the subkeys.

    Queries are ``[T, H k]``, the scores ``[T, H, 2, N]`` in fp32 (fp64 for fp64). Both factors are
    in the model's dtype and the sums are kept wide, so that trainer and server choose the same
    rows.
    """
    if keys.packed is not None:
        native, packed, shape = keys.packed
        return native.linear(packed, q_TF).view(shape)
    return half_scores_by_torch(q_TF, keys)


def half_scores_by_torch(q_TF: Tensor, keys: ProductKeys) -> Tensor:
    """``half_scores`` on any device, at any precision, and with gradients."""
    subkeys_H2Nk, query_norm = keys.owner.subkeys, keys.owner.query_norm
    num_heads, _, _, half_dim = subkeys_H2Nk.shape
    q_TH2k = q_TF.view(-1, num_heads, 2, half_dim)
    if query_norm is not None:
        q_TH2k = rms_norm(q_TH2k, query_norm, keys.owner.norm_eps)
    wide = torch.promote_types(q_TF.dtype, torch.float32)
    # a trainer's subkeys are wider, and its autocast would narrow the sums
    narrow_H2Nk = subkeys_H2Nk.to(q_TF.dtype)
    with torch.autocast(q_TF.device.type, enabled=False):
        return torch.einsum("thck,hcnk->thcn", q_TH2k.to(wide), narrow_H2Nk.to(wide))
