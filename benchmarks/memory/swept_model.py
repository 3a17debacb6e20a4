"""The model that ``memplus bench memory`` measures, with its own tables or drawn ones."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.memory.load import DRAWN_SIZES, MemoryLoad
from benchmarks.memory_variant import TOP_K
from benchmarks.random_memory import variant_config, write_resized, write_variant
from benchmarks.row_trace import AccessTrace, shaped_trace
from engine.errors import ConfigError
from engine.model.config import MemoryConfig, ModelConfig
from memory_ops.row_formats import ROW_FORMATS
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.convert import convert
from weights.checkpoints.dtype_names import TABLE_DTYPES
from weights.checkpoints.table_files import stored_layout


@dataclass(frozen=True)
class SweptModel:
    """A model with memory layers, or one that gets the benchmarks' three Memory+ layers.

    Attributes:
        source: its checkpoint folder.
        config: its shapes, memory layers included.
        own_rows: rows per table of the model; None if it has no memory layers.
        own_dtype: dtype of these rows; None without own memory layers.
    """

    source: Path
    config: ModelConfig
    own_rows: int | None = None
    own_dtype: str | None = None

    @classmethod
    def open(cls, source: Path) -> "SweptModel":
        """Read a folder's headers.

        Raises:
            CheckpointError: it cannot be read, or has neither memory layers nor enough layers.
            ConfigError: its tables have rows of several dtypes, or of float64.
        """
        config, stored = open_checkpoint(source)
        model = config.model
        if model.memory is None:
            return cls(source, variant_config(source, model, TOP_K))
        dtypes = sorted({stored_layout(stored[name]).name for name in model.table_names})
        if len(dtypes) > 1:
            raise ConfigError(f"model: the tables of {source} have rows of {' and '.join(dtypes)}")
        if dtypes[0] not in TABLE_DTYPES:
            raise ConfigError(
                f"model: the rows of {source} are {dtypes[0]}; convert them with `memplus quantize"
                f" {source} DST --table-dtype float32`"
            )
        return cls(source, model, model.memory.num_rows, dtypes[0])

    @property
    def memory(self) -> MemoryConfig:
        """Shapes of the memory layers; the number of subkeys is that of own tables."""
        assert self.config.memory is not None
        return self.config.memory

    def is_own(self, rows: int) -> bool:
        """Whether tables of that many rows are the model's own; others are drawn."""
        return rows == self.own_rows

    def settled(self, load: MemoryLoad, *, has_trace: bool) -> MemoryLoad:
        """The load with this model's defaults.

        ``has_trace``: the user gave a trace.

        Raises:
            ConfigError: this model cannot have these rows, or a trace would not be used.
        """
        own_dtype, is_traced = self.own_dtype, has_trace or self.own_rows is None
        load = replace(
            load,
            rows=load.rows or (DRAWN_SIZES if self.own_rows is None else (self.own_rows,)),
            row_dtypes=load.row_dtypes or (own_dtype or "bfloat16",),
            skews=load.skews or ("recorded" if is_traced else "zipf",),
        )
        if has_trace and "recorded" not in load.skews:
            raise ConfigError("trace: has no effect unless skews has recorded")
        for rows in load.rows:
            if math.isqrt(rows) < self.memory.top_k:
                raise ConfigError(
                    f"rows: {rows} are too few: a head reads {self.memory.top_k} rows, so tables"
                    f" need at least {self.memory.top_k}^2"
                )
            for dtype in load.row_dtypes:
                if self.is_own(rows) and own_dtype in ROW_FORMATS and dtype != own_dtype:
                    raise ConfigError(
                        f"row_dtypes: the model's own rows are {own_dtype} already, which cannot"
                        f" become {dtype}; other numbers of rows can"
                    )
        return load

    def trace(self, file: Path, load: MemoryLoad) -> AccessTrace:
        """Load a trace whose reads can be replayed on tables of all sizes of a settled load.

        Raises:
            ConfigError: it has a number of rows that does not fit one of the sizes.
            DataError: it cannot be read, or is that of another model.
        """
        memory = self.memory
        shape = len(self.config.memory_layers), memory.num_heads, memory.top_k
        trace = shaped_trace(file, shape)
        recorded = trace.counts_MR.shape[1]
        if self.own_rows not in (None, recorded):
            raise ConfigError(
                f"trace: {file} reads tables of {recorded} rows, but the model's have"
                f" {self.own_rows}; record one with `memplus bench trace TEXTS --model"
                f" {self.source} --out FILE.npz`"
            )
        for rows in load.rows:
            if rows % recorded and recorded % rows:
                raise ConfigError(
                    f"rows: {rows} is neither a multiple nor a divisor of the {recorded} rows of"
                    f" the trace {file}"
                )
        return trace

    def folder(self, out: Path, rows: int, dtype: str) -> Path:
        """The folder of the model with such tables, below ``out`` if it has to be written.

        Raises:
            CheckpointError: the model cannot be read, or its rows cannot be converted.
        """
        if self.is_own(rows) and dtype == self.own_dtype:
            return self.source
        made = out / "models" / f"{dtype}-{rows}"
        if made.exists():
            return made
        if self.is_own(rows):
            convert(self.source, made, table_dtype=dtype)
        elif self.own_rows is None:
            write_variant(self.source, made, math.isqrt(rows), dtype)
        else:
            write_resized(self.source, made, math.isqrt(rows), dtype)
        return made

    def describe(self) -> str:
        """One line: the model, its memory layers and its own tables."""
        memory, layers = self.memory, self.config.memory_layers
        reads = f"{memory.num_heads} heads x {memory.top_k} rows"
        if self.own_rows is None:
            return (
                f"{self.source}: no memory layers; measured with {len(layers)} Memory+ layers of"
                f" {reads} in place of feed-forwards, all rows drawn"
            )
        kinds = " and ".join(sorted({self.config.feed_forward[layer] for layer in layers}))
        tables = len(self.config.table_names)
        number = f"{tables} tables" if tables > 1 else "one table"
        return (
            f"{self.source}: {len(layers)} {kinds} layers of {reads}; {number} of"
            f" {self.own_rows:,} rows x {memory.value_dim} {self.own_dtype}"
        )
