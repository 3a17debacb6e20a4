"""Engines that each read tables of one size: in memory, from disk, or through mapped files."""

import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from benchmarks.engine_rounds import EngineRounds, TimedStep
from benchmarks.memory.access import DrawnAccess, RecordedAccess, RowAccess
from benchmarks.memory.load import MOST_SEQUENCES, MemoryLoad, Point, Round
from benchmarks.memory.points import INPUT_LEN, UNTIMED_LEN
from benchmarks.memory.replayed import Replay, ReplayedTable
from benchmarks.row_trace import AccessTrace
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.executors.executor import make_executor
from engine.executors.lookahead import LookaheadConfig
from engine.model.config import MemoryConfig, ModelConfig
from engine.model.step_work import ModelWork
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable, row_cache_bytes
from memory_ops.tables.table_statistics import TableStatistics
from weights.checkpoints.checkpoint import load_model, open_checkpoint
from weights.checkpoints.table_files import stored_layout
from weights.checkpoints.tensor_files import StoredTensor, read_mapped

_KV_GIB = 0.25


@dataclass
class Reader:
    """An engine, its tables, and the replay that selects the rows.

    Attributes:
        work: the model's work, with rows as they are stored.
        dtype: dtype of the weights.
        steps: the timed steps of the last round.
    """

    rounds: EngineRounds
    tables: Sequence[ReplayedTable]
    replay: Replay
    work: ModelWork
    dtype: torch.dtype
    steps: Sequence[TimedStep] = ()

    @property
    def disk_tables(self) -> list[DiskTable]:
        """The tables that are read from disk: all or none."""
        return [one.table for one in self.tables if isinstance(one.table, DiskTable)]

    def round(self, point: Point, load: MemoryLoad, access: RowAccess, number: int) -> Round:
        """Run and time one round of decode or prefill, after a warm-up unless the point is cold.

        Raises:
            TableReadError: rows could not be read.
        """
        replay, before = self.replay, list[TableStatistics]()
        replay.access = access
        is_disk = bool(self.disk_tables)
        if point.prompt_len and not point.is_cold:  # exclude one-time set-up from the timing
            replay.begin(0)
            replay.prepare([number], point.prompt_len, warm_up=True)
            self.rounds.prefill(point.prompt_len)
        if is_disk and not point.is_cold:
            for one, table in zip(self.tables, self.disk_tables, strict=True):
                one.warm_up(table.num_slots)
        replay.begin(number * load.output_len)

        def prepare_step() -> None:
            replay.prepare(range(point.batch))
            if not before:
                before.append(self._counted())

        try:
            if point.prompt_len:
                replay.prepare([number], point.prompt_len)
                before.append(self._counted())
                steps = self.rounds.prefill(point.prompt_len)
            else:
                steps = self.rounds.decode(point.batch, INPUT_LEN, load.output_len, prepare_step)
        except RuntimeError:
            if replay.error is not None:
                raise replay.error from None
            raise
        self.steps = steps
        seconds = sum(step.seconds for step in steps)
        tokens = point.prompt_len or len(steps) * point.batch
        if not is_disk:
            return Round(tokens / seconds, seconds, 1.0 if point.tier == "device" else None)
        counted = self._counted().since(before[0])
        return Round(
            tokens_per_s=tokens / seconds,
            seconds=seconds,
            hit_rate=counted.hits / counted.unique_rows,
            late_rate=counted.late / counted.unique_rows,
            misses_per_token=counted.misses / tokens,
            reads_per_token=(counted.misses + counted.prefetched) / tokens,
            stall_s=counted.stall_seconds,
        )

    def close(self) -> None:
        """Close the files of the tables."""
        for table in self.disk_tables:
            table.close()

    def _counted(self) -> TableStatistics:
        """Totals of all tables and layers."""
        return TableStatistics.sum(
            counts for table in self.tables for counts in table.statistics().values()
        )


def make_reader(folder: Path, point: Point, load: MemoryLoad) -> Reader:
    """Make an engine for a point's tables, tier and lookahead; batch and skew may vary by round.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: the row cache is too small, or the filesystem does not support direct reads.
    """
    checkpoint, stored = open_checkpoint(folder)
    config, memory = checkpoint.model, checkpoint.model.memory
    assert memory is not None
    names = config.table_names
    cache = {"disk": point.cache_bytes}.get(point.tier)
    if point.tier == "mmap":
        # a placeholder: mapped tables replace it, and none of their pages may be in memory
        cache = sum(_smallest_cache(stored[name], memory) for name in names)
    # the benchmark warms row caches itself
    model, _ = load_model(folder, table_cache=cache, fill_cache=False)
    uniform = access_patterns(("uniform",), memory, None)["uniform"]
    layers = config.memory_layers
    replay = Replay(
        layers,
        uniform,
        *((point.recall, point.candidates) if point.candidates is not None else ()),
        peer_layers=[layer for layer in layers if config.layer_tables(layer).down is not None],
    )
    replayed: dict[str, ReplayedTable] = {}
    for name in names:
        table = _mapped_cold(stored[name]) if point.tier == "mmap" else model.tables[name]
        assert isinstance(table, DeviceTable | DiskTable)
        if isinstance(table, DiskTable) and table.location.alignment == 1:
            raise ConfigError(f"tiers: disk needs direct reads, which {folder} does not support")
        readers = [layer for layer in layers if name in astuple(config.layer_tables(layer))]
        replayed[name] = ReplayedTable(table, replay, readers)
    model.attach_tables(replayed)
    lookahead = None
    if point.candidates is not None:
        candidates = max(1, round(point.candidates * memory.top_k))
        lookahead = LookaheadConfig(point.lookahead, candidates)
    settings = _engine_config(config, load)
    engine = Engine(make_executor(model, settings, lookahead), settings)
    rounds = EngineRounds(engine, settings)
    if not point.is_cold:
        rounds.decode(1, INPUT_LEN, 1)  # exclude one-time set-up from the timing
    row_bytes = stored[names[0]].num_bytes // stored[names[0]].shape[0]
    work = ModelWork(config, model.dtype.itemsize, row_bytes)
    return Reader(rounds, [*replayed.values()], replay, work, model.dtype)


def _engine_config(model: ModelConfig, load: MemoryLoad) -> EngineConfig:
    """An engine with KV blocks for all sequences of the load."""
    block = EngineConfig.block_size
    length = INPUT_LEN + UNTIMED_LEN + load.output_len + block
    tokens = max(max(load.batches) * length, max(load.prompt_lens, default=0) + 2 * block)
    needed = tokens * model.kv_bytes_per_token(itemsize=4) / 2**30
    return EngineConfig(kv_cache_gib=max(_KV_GIB, needed), max_num_seqs=MOST_SEQUENCES)


def _smallest_cache(stored: StoredTensor, memory: MemoryConfig) -> int:
    """Bytes of a row cache for the rows that one token reads."""
    rows = min(memory.num_heads * memory.top_k, memory.num_rows)
    return row_cache_bytes(rows, stored.num_bytes // stored.shape[0], memory.num_rows)


def _mapped_cold(stored: StoredTensor) -> DeviceTable:
    """A table of a mapped file, with the file's pages dropped from the page cache."""
    with open(stored.file, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return DeviceTable(stored_layout(stored).table(read_mapped(stored)))


def access_patterns(
    skews: Sequence[str], memory: MemoryConfig, trace: AccessTrace | None
) -> dict[str, RowAccess]:
    """The access pattern of each skew, for tables and reads of these shapes."""
    num_rows, shape = memory.num_rows, (memory.num_heads, memory.top_k)
    patterns: dict[str, RowAccess] = {}
    for skew in skews:
        if skew == "recorded":
            assert trace is not None
            patterns[skew] = RecordedAccess(trace, num_rows)
        else:
            patterns[skew] = DrawnAccess(num_rows, shape, is_zipf=skew == "zipf")
    return patterns
