"""Memory that a training run needs, computed from its settings before it allocates any."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from weights.available_memory import AvailableMemory
from weights.checkpoints.memory_request import size_text
from weights.checkpoints.table_files import OUTPUT_DTYPES
from weights.training.table_sharding import shard_of
from weights.training.train_config import TrainConfig

_FLOAT = 4  # bytes of fp32
_PLACE = 4  # bytes of int32
_REFERENCE = 12  # bytes of a row id and its weight


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process of a run.

    Attributes:
        weights: dense weights, fp32.
        gradients: gradients of the trained dense weights.
        moments: AdamW's two moments of them.
        rows: rows of all tables, or this process's parts of them.
        row_moments: their moments; their pages are taken when a row is first read.
        activations: estimate of what a pass keeps for its backward pass.
        places: on a GPU, the places of the copied rows of a table in host memory; else 0.
        is_table_on_host: whether rows lie in host memory and the rest on a GPU.
        is_row_wise: whether rows have one moment each, which stays on the device.
        is_on_gpu: whether the device is a GPU. Weights and tables are made in host memory first.
        exchanged: most bytes of rows and gradients that divided tables exchange at one time.
        other_parts: rows and moments of the parts of tables that other processes hold.
    """

    weights: int
    gradients: int
    moments: int
    rows: int
    row_moments: int
    activations: int
    places: int = 0
    is_table_on_host: bool = False
    is_row_wise: bool = False
    is_on_gpu: bool = False
    exchanged: int = 0
    other_parts: int = 0

    @property
    def certain(self) -> int:
        """Bytes that every run takes on its device."""
        return sum(self._certain_parts.values())

    @property
    def _certain_parts(self) -> dict[str, int]:
        parts = {"weights": self.weights, "gradients": self.gradients, "moments": self.moments}
        if not self.is_table_on_host:
            return parts | {"table rows": self.rows}
        parts |= {"places of rows": self.places}
        return parts | {"moments of rows": self.row_moments} if self.is_row_wise else parts

    @property
    def _host_parts(self) -> dict[str, int]:
        """Bytes in host memory by their use, if the tables are there."""
        parts = {"table rows": self.rows}
        return parts if self.is_row_wise else parts | {"moments of rows": self.row_moments}

    @property
    def _first_host_parts(self) -> dict[str, int]:
        """Bytes in host memory by their use, before a GPU gets its weights and tables."""
        return {"weights": self.weights, "table rows": self.rows} if self.is_on_gpu else {}

    @property
    def total(self) -> int:
        """Bytes on the device if all rows are read."""
        moments = 0 if self.is_table_on_host else self.row_moments
        return self.certain + moments + self.activations + self.exchanged

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint on disk."""
        of_tables = self.rows + self.row_moments + self.other_parts
        return self.weights + self.moments + of_tables

    def check_fits(self, memory: AvailableMemory, processes: int = 1) -> None:
        """Raise ConfigError if ``processes`` that share the memory certainly need more."""
        if processes * self.certain > memory.num_bytes:
            raise ConfigError(
                f"model: training needs at least {size_text(processes * self.certain)} of memory"
                f" ({_named(self._certain_parts)}), but only {size_text(memory.num_bytes)} is"
                f" available ({memory.bound}); make the model or its table"
                " (model.memory.num_subkeys, value_dim) smaller"
            )

    def check_host_fits(self, host: AvailableMemory, processes: int) -> None:
        """Raise ConfigError if host memory does not hold what ``processes`` that train on GPUs
        need: at first weights and tables, then tables that stay there, with their moments."""
        first = processes * sum(self._first_host_parts.values())
        if first > host.num_bytes:
            raise ConfigError(
                f"model: weights and tables are made in host memory before the GPU gets them, which"
                f" needs {size_text(first)} ({_named(self._first_host_parts)}), but only"
                f" {size_text(host.num_bytes)} is available ({host.bound}); make the model or its"
                " table (model.memory.num_subkeys, value_dim) smaller, or free memory"
            )
        needed = processes * sum(self._host_parts.values()) if self.is_table_on_host else 0
        if needed > host.num_bytes:
            raise ConfigError(
                f"run.table_tier: host needs {size_text(needed)} ({_named(self._host_parts)}), but"
                f" only {size_text(host.num_bytes)} is available ({host.bound}); set"
                " optimizer.row_wise or optimizer.moment_dtype, or make the table smaller"
            )

    def disk_line(self, folder: Path, count: int) -> str:
        """A line about the room for ``count`` more checkpoints in a folder, which may not exist.

        Raises:
            ConfigError: the folder's disk has less room.
        """
        place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        free, needed = shutil.disk_usage(place).free, count * self.checkpoint
        needs = f"checkpoints need {size_text(needed)} ({count} of {size_text(self.checkpoint)})"
        if needed > free:
            raise ConfigError(f"{folder}: {needs}, but only {size_text(free)} is free on its disk")
        return f"disk: {needs}; {size_text(free)} is free"

    def describe(self, memory: AvailableMemory | None, processes: int = 1) -> list[str]:
        """Lines for the user; ``memory`` is None if it is not known."""
        share = f" in each of {processes} processes" if processes > 1 else ""
        parts = self._certain_parts
        if not self.is_table_on_host:
            parts |= {"moments of rows": self.row_moments}
        parts |= {"activations, estimated": self.activations}
        if self.exchanged:
            parts |= {"exchanged rows, at most": self.exchanged}
        line = f"memory: torch itself, and about {size_text(self.total)}{share} ({_named(parts)})"
        if memory is not None:
            line += f"; {size_text(memory.num_bytes)} is available ({memory.bound})"
        lines = [line]
        if self.is_table_on_host:
            lines.append(f"host memory{share}: {_named(self._host_parts)}")
        if self.is_on_gpu:
            lines.append(f"host memory{share}, at the start: {_named(self._first_host_parts)}")
        if memory is not None and processes * self.total > memory.num_bytes:
            lines.append(
                "memory: the run may run out of it; raise run.passes_per_step, set"
                " run.checkpoint_activations or optimizer.row_wise, or make the model smaller"
            )
        return lines


def _named(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())


def training_memory(
    model: nn.Module, shape: ModelConfig, config: TrainConfig, processes: int = 1
) -> TrainingMemory:
    """The memory of one of ``processes`` of a run, with ``model`` on the meta device.

    Raises:
        ConfigError: the tables cannot be divided among the processes.
    """
    sizes = [(one.numel(), one.requires_grad) for one in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    is_on_host = config.run.table_tier == "host"
    rows = row_moments = places = exchanged = other_parts = 0
    if shape.memory is not None:
        whole = shape.memory.num_rows, shape.memory.value_dim
        count, part = len(shape.table_names), _largest_part(whole, config, processes)
        rows, row_moments = (count * size for size in _table_bytes(part, config))
        if part != whole:
            other_parts = count * sum(_table_bytes(whole, config)) - rows - row_moments
            exchanged = _exchanged(shape, config, processes)
        places = _PLACE * count * whole[0] if is_on_host else 0
    return TrainingMemory(
        weights=_FLOAT * sum(size for size, _ in sizes),
        gradients=_FLOAT * trained,
        moments=2 * _FLOAT * trained,
        rows=rows,
        row_moments=row_moments,
        activations=_activations(shape, config, processes),
        places=places,
        is_table_on_host=is_on_host,
        is_row_wise=config.optimizer.row_wise,
        is_on_gpu=config.run.device == "cuda",
        exchanged=exchanged,
        other_parts=other_parts,
    )


def _largest_part(whole: tuple[int, int], config: TrainConfig, processes: int) -> tuple[int, int]:
    """Rows and values of the part of a table that the last process holds, the largest one."""
    kind = config.run.table_sharding
    if kind == "none" or processes == 1:
        return whole
    return shard_of(kind, whole, processes - 1, processes).local_shape


def _table_bytes(part: tuple[int, int], config: TrainConfig) -> tuple[int, int]:
    """Bytes of the rows of a table, or of a part of one, and of their moments."""
    num_rows, values = part[0], part[0] * part[1]
    moment_bytes = OUTPUT_DTYPES[config.optimizer.moment_dtype].itemsize
    moments = _FLOAT * num_rows if config.optimizer.row_wise else 2 * moment_bytes * values
    return _FLOAT * values, moments


def _exchanged(shape: ModelConfig, config: TrainConfig, processes: int) -> int:
    """Most bytes of rows and gradients that divided tables exchange at one time.

    These are the summed gradients of a step, and by columns also the lookups of all tokens.
    """
    memory, run = shape.memory, config.run
    assert memory is not None
    by_rows = run.table_sharding == "rows"
    references = run.tokens_per_step * memory.num_heads * memory.top_k
    layers = math.ceil(len(shape.memory_layers) / len(shape.table_names))
    seen = math.ceil(references / processes) if by_rows else references
    distinct = min(seen * layers, memory.num_rows)
    if by_rows:
        return 2 * _FLOAT * distinct * memory.value_dim  # sent and received
    of_pass = math.ceil(run.tokens_per_step / run.passes_per_step)
    lookup = _REFERENCE * references // run.passes_per_step + _FLOAT * of_pass * memory.value_dim
    return lookup + _FLOAT * distinct * math.ceil(memory.value_dim / processes)


def _activations(shape: ModelConfig, config: TrainConfig, processes: int) -> int:
    """Bytes that a pass keeps in one process, from counts of the tensors that torch saves."""
    run = config.run
    # bfloat16 halves most of them; norms, residuals, scores and the loss stay fp32
    is_half = run.dtype == "bfloat16"
    layers = [_layer_bytes(shape, layer, is_half=is_half) for layer in range(shape.num_layers)]
    if run.checkpoint_activations:
        # the inputs of all layers, and everything of the one that is recomputed
        of_layers = _FLOAT * shape.hidden_size * shape.num_layers + max(layers)
    else:
        of_layers = sum(layers)
    # logits, their log-softmax and its gradient
    per_token = of_layers + 3 * _FLOAT * shape.vocab_size
    return math.ceil(run.tokens_per_step / run.passes_per_step / processes) * per_token


def _layer_bytes(shape: ModelConfig, layer: int, *, is_half: bool) -> int:
    """Bytes per token; ``test_training_memory.py`` compares them with what torch saves."""
    narrow = 2 if is_half else 4
    heads_dim = shape.num_heads * shape.head_dim
    kv_dim = shape.num_kv_heads * shape.head_dim
    # norms and residuals are fp32; projections' inputs, queries, keys and values are narrow
    count = 5 * _FLOAT * shape.hidden_size + narrow * (2 * shape.hidden_size + 2 * heads_dim)
    count += narrow * 2 * kv_dim
    kind = shape.feed_forward[layer]
    if shape.has_dense(layer):
        count += narrow * 4 * shape.intermediate_size
    if kind == "moe":
        assert shape.mixture is not None
        chosen = shape.mixture.top_k
        count += narrow * chosen * (4 * shape.mixture.expert_size + 2 * shape.hidden_size)
    if layer in shape.memory_layers:
        assert shape.memory is not None
        one = shape.memory
        per_head = 2 * one.num_subkeys + 3 * one.top_k + one.query_dim
        count += _FLOAT * (one.num_heads * per_head + 4 * one.value_dim)
    return count
