"""The sweep: all points by turns in one process, each round kept, so that it can be resumed."""

import gc
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.access_trace import AccessTrace, checked_trace
from benchmarks.memory.load import MemoryLoad, Point, Round
from benchmarks.memory.plot import plot
from benchmarks.memory.readers import Reader, accesses, make_reader
from benchmarks.random_memory import MEMORY_LAYERS, NUM_HEADS, TOP_K, write_variant
from benchmarks.read_limits import random_reads_per_s
from benchmarks.serving_plot import check_plot
from engine.allocator import keep_freed_memory
from engine.errors import ConfigError
from memory_ops.row_formats import ROW_FORMATS, row_bytes
from memory_ops.tables.disk import DiskTable, row_cache_bytes
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.convert import convert

_DEPTHS = (64, 128, 256)
_READS = 20_000


def measure(
    source: Path, load: MemoryLoad, trace_file: Path, folder: Path, json_file: Path | None
) -> None:
    """Measure what is not in the folder yet; print, write and draw medians of all that is.

    Raises:
        CheckpointError: the model cannot be read, or has memory layers already.
        ConfigError: the JSON file has no folder, memory for rows is too small, or there is nothing
            to draw with.
        DataError: the trace cannot be read.
    """
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"json: there is no folder {json_file.parent}")
    folder.mkdir(parents=True, exist_ok=True)
    check_plot(folder / "memory.png")
    keep_freed_memory()
    trace = (
        checked_trace(trace_file, (MEMORY_LAYERS, NUM_HEADS, TOP_K))
        if "recorded" in load.skews
        else None
    )
    points = list(_points(source, load))
    _check_settings(folder, source, load, trace)
    rounds = Rounds(folder / "rounds.jsonl")
    missing = [point for point in points if rounds.number(point) < load.rounds]
    if missing:
        _run(missing, source, folder, load, trace, rounds)
    results = [rounds.median(point) for point in points]
    print(_HEADER, *map(_line, results), sep="\n")
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, folder / "memory.png")


class Rounds:
    """A file of rounds, one JSON object a line, by their points."""

    def __init__(self, file: Path) -> None:
        """Read what is there; a line that was cut short is left out."""
        self._file = file
        self._rounds: dict[Point, list[Round]] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                kept = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._rounds.setdefault(Point(**kept["point"]), []).append(Round(**kept["round"]))

    def number(self, point: Point) -> int:
        """How many rounds a point has had."""
        return len(self._rounds.get(point, ()))

    def add(self, point: Point, done: Round) -> None:
        """Keep a round."""
        self._rounds.setdefault(point, []).append(done)
        is_cut = self._file.exists() and not self._file.read_bytes().endswith(b"\n")
        with open(self._file, "a") as file:
            file.write("\n" * is_cut)
            file.write(json.dumps({"point": asdict(point), "round": asdict(done)}) + "\n")

    def median(self, point: Point) -> dict[str, Any]:
        """A point and the median of each of its figures."""
        columns = [asdict(done) for done in self._rounds[point]]
        figures = {
            name: None if columns[0][name] is None else median(column[name] for column in columns)
            for name in columns[0]
        }
        return asdict(point) | figures | {"rounds": len(columns)}


def _points(source: Path, load: MemoryLoad) -> Iterator[Point]:
    model = open_checkpoint(source)[0].model
    width, most = model.hidden_size, model.max_positions
    if max(load.prompt_lens, default=0) >= most:
        raise ConfigError(f"prompt_lens: {max(load.prompt_lens)} and a token exceed {most}")
    works = [(batch, 0) for batch in load.batches] + [(1, length) for length in load.prompt_lens]
    for dtype, rows, tier in product(load.row_dtypes, load.rows, load.tiers):
        size = row_bytes(dtype, width) if dtype in ROW_FORMATS else 2 * width
        cache = row_cache_bytes(round(rows * load.cache_share), size, rows)
        is_disk = tier == "disk"
        for (batch, prompt_len), skew in product(works, load.skews):
            early = load.lookahead if is_disk and not prompt_len else 0
            yield Point(
                rows=rows,
                tier=tier,
                dtype=dtype,
                batch=batch,
                skew=skew,
                cache_bytes=cache if is_disk else 0,
                page_cache=_PAGE_CACHE[tier],
                is_cold=tier == "mmap" or (is_disk and load.cold),
                lookahead=early,
                candidates=load.candidates if early else None,
                recall=load.recall if early else None,
                prompt_len=prompt_len,
            )


_PAGE_CACHE = {"device": "unused", "disk": "excluded", "mmap": "dropped"}


def _run(
    points: Sequence[Point],
    source: Path,
    folder: Path,
    load: MemoryLoad,
    trace: AccessTrace | None,
    rounds: Rounds,
) -> None:
    folders: dict[Point, Path] = {}
    readers: dict[tuple[int, str, str], Reader] = {}
    with tqdm(total=len(points) * load.rounds, unit="round", disable=None) as bar:
        bar.update(sum(rounds.number(point) for point in points))
        for point in points:
            folders[point] = _model(source, folder, point)
        ways = {point.rows: accesses(load.skews, point.rows, trace) for point in points}
        for number in range(load.rounds):
            for point in points:
                if rounds.number(point) <= number:
                    key = (point.rows, point.dtype, point.tier)
                    # what a disk tier keeps follows from all that it has read, in other rounds too
                    if (point.is_cold or point.tier == "disk") and key in readers:
                        readers.pop(key).close()
                        gc.collect()
                    if key not in readers:
                        readers[key] = make_reader(folders[point], point, load)
                    done = readers[key].round(point, load, ways[point.rows][point.skew], number)
                    rounds.add(point, replace(done, limit_reads_per_s=_limit(readers[key])))
                    bar.update()


def _model(source: Path, folder: Path, point: Point) -> Path:
    """The model of a point, written where it is not there yet: its rows are on the disk."""
    bits = point.rows.bit_length() - 1
    wide = folder / "models" / f"bfloat16-{bits}"
    if not wide.exists():
        write_variant(source, wide, 1 << bits // 2)
    if point.dtype == "bfloat16":
        return wide
    narrow = folder / "models" / f"{point.dtype}-{bits}"
    if not narrow.exists():
        convert(wide, narrow, table_dtype=point.dtype)
    return narrow


def _limit(reader: Reader) -> float | None:
    table = reader.table.table
    if not isinstance(table, DiskTable):
        return None
    # other rows each time: none is in a cache of the disk's
    return max(random_reads_per_s(table.place, depth, _READS, time.time_ns()) for depth in _DEPTHS)


def _check_settings(
    folder: Path, source: Path, load: MemoryLoad, trace: AccessTrace | None
) -> None:
    """Keep what rounds of a folder have in common, or check it (ConfigError if it is another)."""
    told = {"model": str(source), "output_len": load.output_len}
    file = folder / "settings.json"
    if trace is not None:
        told["trace"] = hashlib.sha256(trace.rows_TMHK.tobytes()).hexdigest()
    kept = json.loads(file.read_text()) if file.exists() else {}
    for name in told.keys() & kept.keys():
        if told[name] != kept[name]:
            raise ConfigError(f"out: {folder} has rounds of another {name}: {kept[name]}")
    file.write_text(json.dumps(kept | told))


_HEADER = (
    "      rows tier   dtype    batch prompt skew      cache MiB  tokens/s  hits  late  stall s"
    "  of s  reads/token  disk reads/s"
)


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['rows']:>10} {result['tier']:<6} {result['dtype']:<8} {result['batch']:>5}"
        f" {result['prompt_len'] or '-':>6} {result['skew']:<9}"
        f" {result['cache_bytes'] / 2**20:>9.1f}"
        f" {result['tokens_per_s']:>9.1f} {_shown(result['hit_rate'], '5.2f')}"
        f" {_shown(result['late_rate'], '5.2f')} {_shown(result['stall_s'], '8.3f')}"
        f" {result['seconds']:>5.2f} {_shown(result['reads_per_token'], '12.1f')}"
        f" {_shown(result['limit_reads_per_s'], '13.0f')}"
    )


def _shown(value: float | None, how: str) -> str:
    return "-".rjust(int(how.partition(".")[0])) if value is None else format(value, how)
