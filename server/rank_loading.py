"""Checks settings of tensor-parallel ranks before any starts; a rank that cannot load says why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.parallel.channel import Channel
from engine.executors.parallel.messages import RankRefused
from engine.executors.parallel.shares import RankShare
from server.model_options import ModelOptions
from server.rank_share import first_share
from weights.checkpoints.checkpoint import (
    check_no_table_options,
    open_checkpoint,
    serving_dtype,
)
from weights.checkpoints.shard_loading import checked_layout
from weights.checkpoints.tensor_files import StoredTensor
from weights.errors import CheckpointError
from weights.lack_of_memory import lack_of_memory

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class CheckedShare:
    """Rank 0's share of a model, and the tensors of the model's folder.

    Attributes:
        share: rank 0's share.
        weights: the stored tensors by name, without the tables.
        tables: the stored value tables.
        dtype: the dtype of the weights in memory.
    """

    share: RankShare
    weights: Mapping[str, StoredTensor]
    tables: Sequence[StoredTensor]
    dtype: torch.dtype


def checked_share(options: ModelOptions, folder: Path, engine: EngineConfig) -> CheckedShare:
    """Rank 0's share of a folder's model, after the checks that need no memory.

    Raises:
        CheckpointError: the model cannot be served.
        ConfigError: a setting does not fit the model or the number of ranks.
    """
    checkpoint, stored = open_checkpoint(folder)
    config = checkpoint.model
    share = first_share(options, engine.kv_dtype, config)
    tables = [stored[name] for name in config.table_names]
    if not tables:
        check_no_table_options(None, options.table_dtype, options.verify_tables)
    for one in tables:
        checked_layout(one, options.table_dtype, share)
    dense = {name: one for name, one in stored.items() if name not in config.table_names}
    return CheckedShare(share, dense, tables, serving_dtype(checkpoint, stored, options.dtype))


def loaded_or_refused(connection: Channel, load: Callable[[], Loaded]) -> Loaded | None:
    """Call ``load`` and return its result. If this rank cannot load, tell rank 0 and return None.

    Errors that are neither about the model, nor a setting, nor too little memory go through.
    """
    try:
        return load()
    except (CheckpointError, ConfigError) as error:
        connection.send(RankRefused(str(error)))
    except (MemoryError, OSError, RuntimeError) as error:
        reason = lack_of_memory(error)
        if reason is None:
            raise
        connection.send(RankRefused(reason))
    return None
