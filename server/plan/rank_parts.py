"""Parts of a model that tensor-parallel ranks have: their bytes, and their work in a step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from engine.executors.parallel.shares import RankShare
from engine.model.step_work import ModelWork
from weights.checkpoints.shard_loading import is_mapped, share_layout
from weights.checkpoints.table_files import RowLayout
from weights.checkpoints.tensor_files import StoredTensor


@dataclass(frozen=True)
class RankPart:
    """One process's part of a model.

    Attributes:
        weight_bytes: bytes of its weights outside the tables, whole ones included.
        table_bytes: bytes of its part of all tables.
        kv_bytes: bytes of one token's keys and values of its heads.
        work: its least work of a step.
    """

    weight_bytes: int
    table_bytes: int
    kv_bytes: int
    work: ModelWork


def rank_parts(
    first: RankShare, tensors: Mapping[str, Tensor], layout: RowLayout | None, dtype: torch.dtype
) -> tuple[RankPart, ...]:
    """The parts of all ranks, that of rank 0 first.

    Args:
        first: rank 0's share.
        tensors: the model's tensors outside the tables, by name.
        layout: the layout of a whole table; None without tables.
        dtype: dtype of the weights, of keys and of values.

    Raises:
        ConfigError: as ``share_layout``.
    """
    ranks = range(first.size)
    return tuple(_part(replace(first, rank=rank), tensors, layout, dtype) for rank in ranks)


def mapped_bytes(
    tensors: Mapping[str, Tensor], stored: Mapping[str, StoredTensor], dtype: torch.dtype
) -> int:
    """Bytes of the weights that all ranks on a CPU have in memory once, together.

    Without ``stored`` the weights are taken to be stored in ``dtype``.
    """
    return dtype.itemsize * sum(
        one.numel()
        for name, one in tensors.items()
        if is_mapped(name, stored[name] if stored else None, dtype)
    )


def _part(
    share: RankShare, tensors: Mapping[str, Tensor], layout: RowLayout | None, dtype: torch.dtype
) -> RankPart:
    config = share.config
    numbers = 0
    for name, one in tensors.items():
        shape, part = list(one.shape), share.part(name)
        if part is not None:
            shape[part.dim] = len(part)
        numbers += prod(shape)
    own_bytes = 0 if layout is None else share_layout(layout, share).num_bytes
    rows = 1 if config.memory is None else len(share.read_rows)
    work = ModelWork(config, dtype.itemsize, own_bytes // rows, share=share)
    return RankPart(
        weight_bytes=dtype.itemsize * numbers,
        table_bytes=len(config.table_names) * own_bytes,
        kv_bytes=work.kv_bytes,
        work=work,
    )
