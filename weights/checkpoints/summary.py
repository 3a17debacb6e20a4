"""Summary of a checkpoint folder: shapes, parameters and bytes, read from its headers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.grouped_weights import GroupFormat
from weights.checkpoints.checkpoint import expected_tensors, open_checkpoint
from weights.checkpoints.stored_groups import stored_formats
from weights.checkpoints.table_files import stored_format, table_shape
from weights.checkpoints.tensor_files import StoredTensor


@dataclass(frozen=True)
class Count:
    """Number of parameters, their bytes on disk, and their dtypes."""

    parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """Sizes of a model.

    Attributes:
        config: shapes and layer kinds.
        dense: all tensors except the value tables.
        table: the value tables.
        active: parameters that one token uses: the dense ones without unchosen experts, and the
            table rows that it reads.
    """

    config: ModelConfig
    dense: Count
    table: Count
    active: int


def summarize(folder: Path) -> Summary:
    """Count a folder's parameters.

    Raises:
        CheckpointError: as ``weights.checkpoints.checkpoint.open_checkpoint``.
    """
    config, stored = open_checkpoint(folder)
    tables = config.model.table_names
    others = [tensor for name, tensor in stored.items() if name not in tables]
    dense = _count_dense(others, expected_tensors(config.model), stored_formats(stored))
    table = _count(tensor for name, tensor in stored.items() if name in tables)
    active = dense.parameters + _values_read(config.model) - _idle_experts(config.model)
    return Summary(config.model, dense, table, active)


def describe(summary: Summary) -> str:
    """The summary as text to print."""
    config = summary.config
    lines = [
        f"layers        {config.num_layers}: {_describe_kinds(config)}",
        f"width         {config.hidden_size}, feed-forward {config.intermediate_size}",
        f"attention     {config.num_heads} heads of {config.head_dim},"
        f" {config.num_kv_heads} for keys and values{', normalised' if config.qk_norm else ''}",
        f"vocabulary    {config.vocab_size}, {'tied' if config.tie_embeddings else 'untied'} head",
        f"positions     {config.max_positions}",
    ]
    if config.memory is not None:
        memory = config.memory
        tables = (
            "one shared table"
            if len(config.table_names) == 1
            else f"{len(config.table_names)} tables"
        )
        lines += [
            f"memory        {tables} of {memory.num_rows:,} rows x {memory.value_dim},"
            f" {memory.num_heads} heads x {memory.top_k} rows per token"
            f"{', beside feed-forwards' if memory.placement == 'beside' else ''}"
        ]
    if config.mixture is not None:
        mixture = config.mixture
        lines += [
            f"experts       {mixture.top_k} of {mixture.num_experts} per token,"
            f" {mixture.expert_size} wide"
        ]
    lines.append(f"active        {summary.active:,} parameters per token")
    lines.append(f"dense         {_describe_count(summary.dense)}")
    lines.append(f"table         {_describe_count(summary.table)}")
    return "\n".join(lines)


def _values_read(config: ModelConfig) -> int:
    """Number of values in the rows that one token reads, over all memory layers."""
    memory = config.memory
    if memory is None:
        return 0
    tables = len(config.memory_layers) + config.feed_forward.count("peer")
    return tables * memory.num_heads * memory.top_k * memory.value_dim


def _idle_experts(config: ModelConfig) -> int:
    """Number of parameters of the experts that one token does not choose, over all layers."""
    mixture = config.mixture
    if mixture is None:
        return 0
    expert = 3 * config.hidden_size * mixture.expert_size
    return config.feed_forward.count("moe") * (mixture.num_experts - mixture.top_k) * expert


def _count_dense(
    tensors: list[StoredTensor],
    expected: Mapping[str, Tensor],
    formats: Mapping[str, GroupFormat],
) -> Count:
    """The count of tensors outside tables; ``expected`` are those of the dense model."""
    weights = [one for one in tensors if one.name in expected]  # others are scales of groups
    layers = {one.name.removesuffix(".weight"): one.dtype for one in weights}
    dtypes = {str(formats.get(name, code)) for name, code in layers.items()}
    return Count(
        parameters=sum(expected[one.name].numel() for one in weights),
        num_bytes=sum(one.num_bytes for one in tensors),
        dtypes=tuple(sorted(dtypes)),
    )


def _count(tensors: Iterable[StoredTensor]) -> Count:
    found = list(tensors)
    return Count(
        parameters=sum(math.prod(table_shape(tensor)) for tensor in found),
        num_bytes=sum(tensor.num_bytes for tensor in found),
        dtypes=tuple(sorted({_format(tensor) for tensor in found})),
    )


def _format(tensor: StoredTensor) -> str:
    records = stored_format(tensor)
    return tensor.dtype if records is None else records[0]


def _describe_kinds(config: ModelConfig) -> str:
    kinds = sorted(set(config.feed_forward))
    return ", ".join(f"{config.feed_forward.count(kind)} {kind}" for kind in kinds)


def _describe_count(count: Count) -> str:
    if not count.parameters:
        return "none"
    dtypes = ", ".join(count.dtypes)
    return f"{count.parameters:,} parameters, {count.num_bytes:,} bytes, {dtypes}"
