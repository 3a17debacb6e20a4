"""Runs the sweep of ``memplus bench memory``: interleaved rounds, saved so that it can resume."""

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

from benchmarks.memory.load import MemoryLoad, Point, Round
from benchmarks.memory.plot import plot
from benchmarks.memory.readers import Reader, access_patterns, make_reader
from benchmarks.memory_variant import MEMORY_LAYERS, NUM_HEADS, TOP_K
from benchmarks.random_memory import write_variant
from benchmarks.read_limits import random_reads_per_s
from benchmarks.row_trace import AccessTrace, checked_trace
from benchmarks.serving_plot import check_plot
from engine.errors import ConfigError
from memory_ops.row_formats import ROW_FORMATS, row_bytes
from memory_ops.tables.disk import DiskTable, row_cache_bytes
from server.allocator import keep_freed_memory
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.convert import convert

_DEPTHS = (64, 128, 256)
_READS = 20_000


def measure(
    source: Path, load: MemoryLoad, trace_file: Path, folder: Path, json_file: Path | None
) -> None:
    """Run the rounds that the folder lacks; print, write and plot the medians of all rounds.

    Raises:
        CheckpointError: the model cannot be read, or has memory layers.
        ConfigError: the row cache is too small, the folder has rounds of other settings, or
            matplotlib is missing.
        DataError: the trace cannot be read.
    """
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
    """Rounds by point, saved in a file of one JSON object per line."""

    def __init__(self, file: Path) -> None:
        """Load the saved rounds; an incomplete line is skipped."""
        self._file = file
        self._rounds: dict[Point, list[Round]] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                saved = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._rounds.setdefault(Point(**saved["point"]), []).append(Round(**saved["round"]))

    def number(self, point: Point) -> int:
        """Number of saved rounds of a point."""
        return len(self._rounds.get(point, ()))

    def add(self, point: Point, done: Round) -> None:
        """Save a round."""
        self._rounds.setdefault(point, []).append(done)
        is_cut = self._file.exists() and not self._file.read_bytes().endswith(b"\n")
        with open(self._file, "a") as file:
            file.write("\n" * is_cut)
            file.write(json.dumps({"point": asdict(point), "round": asdict(done)}) + "\n")

    def median(self, point: Point) -> dict[str, Any]:
        """A point's fields and the median of each measurement."""
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
        raise ConfigError(f"prompt_lens: {max(load.prompt_lens)} must be below {most}")
    workloads = [*((batch, 0) for batch in load.batches), *((1, n) for n in load.prompt_lens)]
    for dtype, rows, tier in product(load.row_dtypes, load.rows, load.tiers):
        size = row_bytes(dtype, width) if dtype in ROW_FORMATS else 2 * width
        cache = row_cache_bytes(round(rows * load.cache_share), size, rows)
        is_disk = tier == "disk"
        for (batch, prompt_len), skew in product(workloads, load.skews):
            lookahead = load.lookahead if is_disk and not prompt_len else 0
            yield Point(
                rows=rows,
                tier=tier,
                dtype=dtype,
                batch=batch,
                skew=skew,
                cache_bytes=cache if is_disk else 0,
                page_cache=_PAGE_CACHE[tier],
                is_cold=tier == "mmap" or (is_disk and load.cold),
                lookahead=lookahead,
                candidates=load.candidates if lookahead else None,
                recall=load.recall if lookahead else None,
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
        patterns = {point.rows: access_patterns(load.skews, point.rows, trace) for point in points}
        for number in range(load.rounds):
            for point in points:
                if rounds.number(point) <= number:
                    key = (point.rows, point.dtype, point.tier)
                    # the disk tier's cache depends on all earlier reads, of other rounds too
                    if (point.is_cold or point.tier == "disk") and key in readers:
                        readers.pop(key).close()
                        gc.collect()
                    if key not in readers:
                        readers[key] = make_reader(folders[point], point, load)
                    done = readers[key].round(point, load, patterns[point.rows][point.skew], number)
                    rounds.add(point, replace(done, limit_reads_per_s=_limit(readers[key])))
                    bar.update()


def _model(source: Path, folder: Path, point: Point) -> Path:
    """Folder of the point's model, which is written if it does not exist yet."""
    bits = point.rows.bit_length() - 1
    bfloat16_folder = folder / "models" / f"bfloat16-{bits}"
    if not bfloat16_folder.exists():
        write_variant(source, bfloat16_folder, 1 << bits // 2)
    if point.dtype == "bfloat16":
        return bfloat16_folder
    converted_folder = folder / "models" / f"{point.dtype}-{bits}"
    if not converted_folder.exists():
        convert(bfloat16_folder, converted_folder, table_dtype=point.dtype)
    return converted_folder


def _limit(reader: Reader) -> float | None:
    table = reader.table.table
    if not isinstance(table, DiskTable):
        return None
    # a new seed reads other rows, which the disk has not cached
    return max(
        random_reads_per_s(table.location, depth, _READS, time.time_ns()) for depth in _DEPTHS
    )


def _check_settings(
    folder: Path, source: Path, load: MemoryLoad, trace: AccessTrace | None
) -> None:
    """Save the settings that a folder's rounds share; ConfigError if saved ones differ."""
    settings = {"model": str(source), "output_len": load.output_len}
    file = folder / "settings.json"
    if trace is not None:
        settings["trace"] = hashlib.sha256(trace.rows_TMHK.tobytes()).hexdigest()
    saved = json.loads(file.read_text()) if file.exists() else {}
    for name in settings.keys() & saved.keys():
        if settings[name] != saved[name]:
            raise ConfigError(f"out: {folder} has rounds with another {name}: {saved[name]}")
    file.write_text(json.dumps(saved | settings))


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
