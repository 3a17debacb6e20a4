"""Memory that the tensor-parallel ranks of one machine take, from the headers of a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from engine.executors.parallel.shares import RankShare
from weights.checkpoints.model_weights import largest_layer_bytes, weight_bytes
from weights.checkpoints.shard_loading import checked_layout, copied_bytes, share_layout
from weights.checkpoints.tensor_files import StoredTensor


@dataclass(frozen=True)
class MachineBytes:
    """Memory of the ranks of one machine.

    Attributes:
        weights: bytes of the weights, with all copies and what is needed to load them.
        tables: bytes of the ranks' parts of the value tables.
        kv_heads: the ranks' share of the KV heads, and so of the KV blocks.
        columns: the ranks' share of the columns, and so of row patches.
    """

    weights: int
    tables: int
    kv_heads: Fraction
    columns: Fraction

    def kv_bytes(self, whole: int) -> int:
        """Bytes of the KV blocks of this machine's heads; ``whole`` is for all heads."""
        return -int(-whole * self.kv_heads // 1)

    def whole_kv_bytes(self, kv_bytes: int) -> int:
        """Bytes of the KV blocks of all heads, if this machine has ``kv_bytes`` for its heads."""
        return int(kv_bytes / self.kv_heads)


def machine_bytes(
    weights: Mapping[str, StoredTensor],
    tables: Sequence[StoredTensor],
    share: RankShare,
    ranks: range,
    dtype: torch.dtype,
    table_dtype: str,
) -> MachineBytes:
    """The memory of some of a model's ranks, which run on one machine.

    Args:
        weights: the stored tensors without the tables.
        tables: the stored tables.
        share: the share of any rank.
        ranks: the ranks of the machine.
        dtype: dtype of the weights in memory.
        table_dtype: as in ``ModelOptions``.

    Raises:
        CheckpointError, ConfigError: as ``checked_layout``.
    """
    here = [replace(share, rank=rank) for rank in ranks]
    heads = sum(one.kv_config.num_kv_heads for one in here)
    elsewhere = [replace(share, rank=rank) for rank in range(share.size) if rank not in ranks]
    layouts = [checked_layout(one, table_dtype, share) for one in tables]
    copies = (len(here) - 1) * copied_bytes(weights, share, dtype)
    once = weight_bytes(weights, dtype, {}) + largest_layer_bytes(weights)
    return MachineBytes(
        weights=once + copies - _split_bytes(weights, elsewhere, dtype),
        tables=sum(share_layout(layout, one).num_bytes for layout in layouts for one in here),
        kv_heads=Fraction(heads, share.config.num_kv_heads),
        columns=Fraction(len(here), share.size),
    )


def _split_bytes(
    weights: Mapping[str, StoredTensor], shares: Sequence[RankShare], dtype: torch.dtype
) -> int:
    """Bytes of these ranks' parts of the weights that are split."""
    total = 0
    layers: dict[str, dict[str, StoredTensor]] = {}
    for name, one in weights.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = one
    for layer, tensors in layers.items():
        split = [one.layer_part(layer) for one in shares]
        parts = [part for part in split if part is not None]
        if not parts:
            continue
        whole = [name for name in tensors if shares[0].part(name) is None]
        num_bytes = weight_bytes(tensors, dtype, {})
        num_bytes -= weight_bytes({name: tensors[name] for name in whole}, dtype, {})
        total += num_bytes * sum(map(len, parts)) // _width(shares[0], layer)
    return total


def _width(share: RankShare, layer: str) -> int:
    """The sum of all ranks' parts of a split layer."""
    parts = (replace(share, rank=rank).layer_part(layer) for rank in range(share.size))
    return sum(len(part) for part in parts if part is not None)
