"""A model as a plan needs it: its shapes and the bytes of its parts, with or without weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.errors import ConfigError
from engine.executors.parallel.shares import RankShare
from engine.model.config import ModelConfig
from engine.model.step_work import ModelWork
from server.plan.exchange import Exchange
from server.plan.options import PlanOptions
from server.plan.rank_parts import RankPart, mapped_bytes, rank_parts
from server.rank_share import first_share
from weights.checkpoints.checkpoint import expected_tensors, open_checkpoint, serving_dtype
from weights.checkpoints.config_json import parse_model
from weights.checkpoints.packed_formats import packed_formats
from weights.checkpoints.table_files import (
    OUTPUT_DTYPES,
    RowLayout,
    requested_layout,
    row_layout,
)
from weights.checkpoints.table_loading import check_unconverted
from weights.checkpoints.tensor_files import StoredTensor
from weights.errors import CheckpointError
from weights.text_files import read_json_object

_SLOWER_TIERS = ("host", "disk")


@dataclass(frozen=True)
class PlannedModel:
    """Sizes of a model in the dtypes in which it will be served.

    Attributes:
        config: shapes.
        dense: number of parameters outside the tables.
        weight_bytes: bytes of these.
        row_bytes: bytes of a table row; 0 without tables.
        table_bytes: bytes of all tables.
        kv_bytes: bytes of one token's keys and values in all layers.
        work: the least work of a step.
        ranks: the parts of the processes that share the model; one has all of it.
        mapped_bytes: bytes of the weights that ranks on a CPU have in memory once, together.
        exchange: what the ranks send each other.
        refused: reasons why ``memplus serve`` refuses a tier, by tier.
    """

    config: ModelConfig
    dense: int
    weight_bytes: int
    row_bytes: int
    table_bytes: int
    kv_bytes: int
    work: ModelWork
    ranks: tuple[RankPart, ...]
    mapped_bytes: int
    exchange: Exchange
    refused: Mapping[str, str]

    def bytes_in_memory(self, kv_tokens: int, *, has_tables: bool, is_on_gpu: bool) -> int:
        """Bytes of weights, keys and values, and tables: of one rank's GPU, or of all ranks."""
        each = [
            rank.weight_bytes + kv_tokens * rank.kv_bytes + rank.table_bytes * has_tables
            for rank in self.ranks
        ]
        return max(each) if is_on_gpu else sum(each) - (len(each) - 1) * self.mapped_bytes


def planned_model(source: Path, options: PlanOptions, *, is_on_gpu: bool) -> PlannedModel:
    """Read the headers of a checkpoint folder, or a ``config.json`` without weights.

    Raises:
        CheckpointError: the file or folder is not valid.
        ConfigError: the stored rows cannot be converted to the requested dtype, or ranks cannot
            share the model.
    """
    config, stored, dtype = _read(source, options)
    share = None
    if options.tensor_parallel > 1:
        share = first_share(options.served, options.kv_dtype, config)
    # ranks have no weights in groups
    formats = {} if share else packed_formats(config, stored, options.weight_dtype)
    tensors = expected_tensors(config, formats)
    for name in config.table_names:
        del tensors[name]
    layout = _layout(config, stored, options.table_dtype)
    num_bytes = 0 if layout is None else layout.num_bytes
    row_bytes = 0 if layout is None else num_bytes // layout.shape[0]
    work = ModelWork(
        config,
        dtype.itemsize,
        row_bytes,
        formats,
        options.kv_dtype,
        has_integer_products=not is_on_gpu,
    )
    weight_bytes = sum(
        one.numel() * (dtype if one.dtype is torch.float32 else one.dtype).itemsize
        for one in tensors.values()
    )
    table_bytes = len(config.table_names) * num_bytes
    whole = RankPart(weight_bytes, table_bytes, work.kv_bytes, work)
    plain = expected_tensors(config)
    return PlannedModel(
        config=config,
        dense=sum(one.numel() for name, one in plain.items() if name not in config.table_names),
        weight_bytes=weight_bytes,
        row_bytes=row_bytes,
        table_bytes=table_bytes,
        kv_bytes=work.kv_bytes,
        work=work,
        ranks=(whole,) if share is None else rank_parts(share, tensors, layout, dtype),
        mapped_bytes=0 if share is None else mapped_bytes(tensors, stored, dtype),
        exchange=_exchange(config, share, dtype.itemsize, is_on_gpu=is_on_gpu),
        refused=_refused_tiers(config, stored, options, layout),
    )


def _read(
    source: Path, options: PlanOptions
) -> tuple[ModelConfig, dict[str, StoredTensor], torch.dtype]:
    """Shapes, stored tensors (none without weights), and the dtype of the served weights."""
    if not source.is_file():
        checkpoint, stored = open_checkpoint(source)
        return checkpoint.model, stored, serving_dtype(checkpoint, stored, options.dtype)
    try:
        config = parse_model(read_json_object(source))
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return config, {}, OUTPUT_DTYPES["bfloat16" if options.dtype == "auto" else options.dtype]


def _layout(
    config: ModelConfig, stored: Mapping[str, StoredTensor], dtype: str
) -> RowLayout | None:
    """The served layout of a table; all tables of a model have the same."""
    memory = config.memory
    if memory is None:
        return None
    chosen = None if dtype == "auto" else dtype
    if stored:
        return requested_layout(stored[config.table_names[0]], chosen)
    return row_layout(chosen or "bfloat16", memory.num_rows, memory.value_dim)


def _exchange(
    config: ModelConfig, share: RankShare | None, itemsize: int, *, is_on_gpu: bool
) -> Exchange:
    if share is None:
        return Exchange(config, 1, "columns", itemsize, is_on_gpu)
    return Exchange(config, share.size, share.table_sharding, itemsize, is_on_gpu)


def _refused_tiers(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    options: PlanOptions,
    layout: RowLayout | None,
) -> dict[str, str]:
    """The errors of ``memplus serve`` by tier."""
    refused = {}
    for tier in _SLOWER_TIERS:
        try:
            replace(options.served, table_tier=tier)
            if tier == "disk" and stored and layout is not None:
                check_unconverted(stored[config.table_names[0]], layout)
        except ConfigError as error:
            refused[tier] = str(error)
    return refused
