"""Engines that each read one table: in memory, from disk, or through a mapped file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine_rounds import EngineRounds
from benchmarks.memory.access import DrawnAccess, RecordedAccess, RowAccess
from benchmarks.memory.load import MemoryLoad, Point, Round
from benchmarks.memory.replayed import Replay, ReplayedTable
from benchmarks.memory_variant import NUM_HEADS, TOP_K
from benchmarks.row_trace import AccessTrace
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.executors.executor import make_executor
from engine.executors.lookahead import LookaheadConfig
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.table_statistics import TableStatistics
from weights.checkpoints.checkpoint import load_model, open_checkpoint
from weights.checkpoints.table_files import stored_layout
from weights.checkpoints.tensor_files import StoredTensor, read_mapped

_ENGINE = EngineConfig(kv_cache_gib=0.25, max_num_seqs=64)
_INPUT_LEN = 16
_TABLE = "memory.table"
_NO_CACHE = 2**20  # placeholder: the table is replaced before any read


@dataclass
class Reader:
    """An engine, its table, and the replay that selects the rows."""

    rounds: EngineRounds
    table: ReplayedTable
    replay: Replay

    def round(self, point: Point, load: MemoryLoad, access: RowAccess, number: int) -> Round:
        """Run and time one round of decode or prefill, after a warm-up unless the point is cold.

        Raises:
            TableReadError: rows could not be read.
        """
        replay, before = self.replay, list[TableStatistics]()
        replay.access = access
        disk = self.table.table if isinstance(self.table.table, DiskTable) else None
        if point.prompt_len and not point.is_cold:  # exclude one-time set-up from the timing
            replay.begin(0)
            replay.prepare([number], point.prompt_len, warm_up=True)
            self.rounds.prefill(point.prompt_len)
        if disk is not None and not point.is_cold:
            self.table.warm_up(disk.num_slots)
        replay.begin(number * load.output_len)

        def prepare_step() -> None:
            replay.prepare(range(point.batch))
            if not before:
                before.append(TableStatistics.sum(self.table.statistics().values()))

        try:
            if point.prompt_len:
                replay.prepare([number], point.prompt_len)
                before.append(TableStatistics.sum(self.table.statistics().values()))
                steps = self.rounds.prefill(point.prompt_len)
            else:
                steps = self.rounds.decode(point.batch, _INPUT_LEN, load.output_len, prepare_step)
        except RuntimeError:
            if replay.error is not None:
                raise replay.error from None
            raise
        seconds = sum(step.seconds for step in steps)
        tokens = point.prompt_len or len(steps) * point.batch
        if disk is None:
            return Round(tokens / seconds, seconds, 1.0 if point.tier == "device" else None)
        counted = TableStatistics.sum(self.table.statistics().values()).since(before[0])
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
        """Close the table's file."""
        if isinstance(self.table.table, DiskTable):
            self.table.table.close()


def make_reader(folder: Path, point: Point, load: MemoryLoad) -> Reader:
    """Make an engine for a point's table, tier and lookahead; batch and skew may vary by round.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: the row cache is too small, or the filesystem does not support direct reads.
    """
    _, stored = open_checkpoint(folder)
    # do not read a mapped table here: none of its pages may be in memory
    cache = {"disk": point.cache_bytes, "mmap": _NO_CACHE}.get(point.tier)
    model, config = load_model(folder, table_cache=cache)
    table = model.tables[_TABLE]
    if point.tier == "mmap":
        table = _mapped_cold(stored[_TABLE])
    assert isinstance(table, DeviceTable | DiskTable)
    if isinstance(table, DiskTable) and table.location.alignment == 1:
        raise ConfigError(f"out: the filesystem of {folder} does not support direct reads")
    uniform = access_patterns(("uniform",), table.num_rows, None)["uniform"]
    recall = load.recall if point.lookahead else 0.0
    replay = Replay(config.model.memory_layers, uniform, recall, load.candidates)
    replayed = ReplayedTable(table, replay)
    model.attach_tables({_TABLE: replayed})
    lookahead = None
    if point.lookahead:
        lookahead = LookaheadConfig(point.lookahead, max(1, round(load.candidates * TOP_K)))
    engine = Engine(make_executor(model, _ENGINE, lookahead), _ENGINE)
    rounds = EngineRounds(engine, _ENGINE)
    if not point.is_cold:
        rounds.decode(1, _INPUT_LEN, 1)  # exclude one-time set-up from the timing
    return Reader(rounds, replayed, replay)


def _mapped_cold(stored: StoredTensor) -> DeviceTable:
    """A table of a mapped file, with the file's pages dropped from the page cache."""
    with open(stored.file, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return DeviceTable(stored_layout(stored).table(read_mapped(stored)))


def access_patterns(
    skews: Sequence[str], num_rows: int, trace: AccessTrace | None
) -> dict[str, RowAccess]:
    """The access pattern of each skew, for a table of ``num_rows`` rows."""
    patterns: dict[str, RowAccess] = {}
    for skew in skews:
        if skew == "recorded":
            assert trace is not None
            patterns[skew] = RecordedAccess(trace, num_rows)
        else:
            patterns[skew] = DrawnAccess(num_rows, (NUM_HEADS, TOP_K), is_zipf=skew == "zipf")
    return patterns
