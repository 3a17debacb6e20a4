"""Engines that read one table each: in memory, from disk, or by page faults of a mapped file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.access_trace import AccessTrace
from benchmarks.engine_rounds import EngineRounds
from benchmarks.memory.access import DrawnAccess, RecordedAccess, RowAccess
from benchmarks.memory.load import MemoryLoad, Point, Round
from benchmarks.memory.replayed import ReplayedFetches, ReplayedTable
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.lookahead import LookaheadConfig
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.disk import DiskTable
from memory_ops.tables.table_statistics import TableStatistics
from weights.checkpoint import load_model, open_checkpoint
from weights.table_files import stored_layout
from weights.tensor_files import StoredTensor, read_mapped

_ENGINE = EngineConfig(kv_cache_gib=0.25, max_num_seqs=64)
_INPUT_LEN = 16
_TABLE = "memory.table"


@dataclass
class Reader:
    """An engine, and how its table is to be put into the state that a point asks for."""

    folder: Path
    rounds: EngineRounds
    replayed: ReplayedTable | None
    stored: StoredTensor

    def round(self, point: Point, load: MemoryLoad, access: RowAccess | None) -> Round:
        """Decode once, from a cache of rows that is warm where the point is."""
        before: list[TableStatistics] = []
        replayed = self.replayed
        if replayed is not None:
            assert access is not None
            replayed.access, replayed.batch = access, point.batch
            self._prepare(point)

        def next_step() -> None:
            if replayed is not None:
                replayed.prepare()
                if not before:
                    before.append(TableStatistics.sum(replayed.statistics().values()))

        steps = self.rounds.decode(point.batch, _INPUT_LEN, load.output_len, next_step)
        seconds = sum(step.seconds for step in steps)
        tokens = len(steps) * point.batch
        if replayed is None or point.tier != "disk":
            return Round(tokens / seconds, 1.0, 0.0, 0.0, 0.0, 0.0, seconds, 0.0)
        after = TableStatistics.sum(replayed.statistics().values())
        counted = {name: getattr(after, name) - getattr(before[0], name) for name in _COUNTS}
        unique = counted["unique"]
        return Round(
            tokens_per_s=tokens / seconds,
            hit_rate=counted["hits"] / unique,
            late_rate=counted["late"] / unique,
            misses_per_token=counted["misses"] / tokens,
            reads_per_token=(counted["misses"] + counted["prefetched"]) / tokens,
            stall_s=counted["stall_seconds"],
            seconds=seconds,
            limit_reads_per_s=0.0,
        )

    def _prepare(self, point: Point) -> None:
        assert self.replayed is not None
        table = self.replayed.table
        if isinstance(table, DiskTable):
            if not point.is_cold:
                self.replayed.warm_up(table.num_slots)
            return
        # the pages of a mapping stay in memory as long as it does
        self.replayed.table = DeviceTable(torch.empty(0, table.value_dim))
        del table
        with open(self.stored.file, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.replayed.table = _mapped(self.stored)


_COUNTS = ("unique", "hits", "late", "misses", "prefetched", "stall_seconds")


def make_reader(folder: Path, point: Point, load: MemoryLoad) -> Reader:
    """An engine for a point's table and tier; its batch and skew may change.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: memory for rows is too small.
    """
    _, stored = open_checkpoint(folder)
    is_disk = point.tier == "disk"
    model, config = load_model(folder, table_cache=point.cache_bytes if is_disk else None)
    layers = config.model.memory_layers
    replayed = None
    if point.tier != "device":
        table = model.tables[_TABLE]
        if point.tier == "mmap":
            table = _mapped(stored[_TABLE])
        evenly = accesses(("uniform",), table.num_rows, None)["uniform"]
        replayed = (
            ReplayedFetches(table, layers, evenly, load.recall)
            if isinstance(table, DiskTable)
            else ReplayedTable(table, layers, evenly, load.recall)
        )
        model.attach_tables({_TABLE: replayed})
        if load.lookahead:
            memory = config.model.memory
            assert memory is not None
            candidates = max(1, round(load.candidates * memory.top_k))
            model.look_ahead(LookaheadConfig(load.lookahead, candidates))
    model.pack()
    rounds = EngineRounds(Engine(model, _ENGINE), _ENGINE)
    rounds.decode(1, _INPUT_LEN, 1)  # what is made at first use takes no time later
    return Reader(folder, rounds, replayed, stored[_TABLE])


def _mapped(stored: StoredTensor) -> DeviceTable:
    return DeviceTable(stored_layout(stored).table(read_mapped(stored)))


def accesses(
    skews: Sequence[str], num_rows: int, trace: AccessTrace | None
) -> dict[str, RowAccess]:
    """How a table of so many rows is read, by the names of skews."""
    made: dict[str, RowAccess] = {}
    for skew in skews:
        if skew == "recorded":
            assert trace is not None
            made[skew] = RecordedAccess(trace, num_rows)
        else:
            made[skew] = DrawnAccess(num_rows, (4, 32), is_zipf=skew == "zipf")
    return made
