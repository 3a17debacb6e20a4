"""Runs the sweep of ``memplus bench memory``: interleaved rounds, saved so that it can resume."""

import contextlib
import gc
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.disk_meter import disk_limits
from benchmarks.limit_meter import LimitMeter
from benchmarks.memory.access import RowAccess
from benchmarks.memory.load import MemoryLoad, Point, Round, default_trace
from benchmarks.memory.planned import planned_tokens_per_s
from benchmarks.memory.plot import plot
from benchmarks.memory.points import points
from benchmarks.memory.readers import Reader, access_patterns, make_reader
from benchmarks.memory.swept_model import SweptModel
from benchmarks.row_trace import AccessTrace
from benchmarks.serving_plot import check_plot
from engine.errors import ConfigError
from engine.model.machine_limits import MachineLimits
from memory_ops.native.disk_rows import RingError
from server.allocator import keep_freed_memory


def measure(
    source: Path, load: MemoryLoad, trace_file: Path | None, folder: Path, json_file: Path | None
) -> None:
    """Run the rounds that the folder lacks; print, write and plot the medians of all rounds.

    A model with memory layers is measured with its own tables, and with drawn ones of the other
    sizes in ``load``. Any other model gets the benchmarks' memory layers.

    Raises:
        CheckpointError: the model cannot be read, or has too few layers for memories.
        ConfigError: the row cache is too small, the folder has rounds of other settings, the trace
            or a size does not fit the model, or matplotlib is missing.
        DataError: the trace cannot be read, or is that of another model.
    """
    model = SweptModel.open(source)
    load = model.settled(load, has_trace=trace_file is not None)
    trace = _trace(model, load, trace_file)
    shares = points(model, load)
    folder.mkdir(parents=True, exist_ok=True)
    check_plot(folder / "memory.png")
    keep_freed_memory()
    _check_settings(folder, source, load, trace)
    rounds = Rounds(folder / "rounds.jsonl")
    missing = [point for point in shares if rounds.number(point) < load.rounds]
    if missing:
        _run(missing, model, folder, load, trace, rounds)
    about = {"model": str(source), "own_rows": model.own_rows}
    results = [
        about | rounds.median(point) | {"cache_share": share} for point, share in shares.items()
    ]
    print(model.describe(), f"rows read: {_described_skews(load, trace_file)}", _HEADER, sep="\n")
    print(*map(_line, results), sep="\n")
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, folder / "memory.png")


def _trace(model: SweptModel, load: MemoryLoad, file: Path | None) -> AccessTrace | None:
    if "recorded" not in load.skews:
        return None
    if file is None and model.own_rows is not None:
        raise ConfigError(
            "skews: recorded needs a trace of this model; record one with `memplus bench trace"
            f" TEXTS --model {model.source} --out FILE.npz` and give it with --trace"
        )
    return model.trace(file or default_trace(), load)


def _described_skews(load: MemoryLoad, trace_file: Path | None) -> str:
    if "recorded" in load.skews:
        return f"{', '.join(load.skews)}; trace {trace_file or default_trace()}"
    return f"{', '.join(load.skews)}; no trace of this model is replayed (--trace FILE.npz)"


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
        """A point's fields and the median of each measurement, over the rounds that have it."""
        columns = [asdict(done) for done in self._rounds[point]]
        figures = {}
        for name in columns[0]:
            measured = [column[name] for column in columns if column[name] is not None]
            figures[name] = median(measured) if measured else None
        return asdict(point) | figures | {"rounds": len(columns)}


def _run(
    missing: Sequence[Point],
    model: SweptModel,
    folder: Path,
    load: MemoryLoad,
    trace: AccessTrace | None,
    rounds: Rounds,
) -> None:
    folders: dict[Point, Path] = {}
    patterns: dict[int, dict[str, RowAccess]] = {}
    readers: dict[tuple[int, str, str], Reader] = {}
    meters: dict[torch.dtype, LimitMeter] = {}
    with tqdm(total=len(missing) * load.rounds, unit="round", disable=None) as bar:
        bar.update(sum(rounds.number(point) for point in missing))
        for point in missing:
            folders[point] = model.folder(folder, point.rows, point.dtype)
            if point.rows not in patterns:
                memory = replace(model.memory, num_subkeys=math.isqrt(point.rows))
                patterns[point.rows] = access_patterns(load.skews, memory, trace)
        for number in range(load.rounds):
            for point in missing:
                if rounds.number(point) <= number:
                    key = (point.rows, point.dtype, point.tier)
                    # the disk tier's cache depends on all earlier reads, of other rounds too
                    if (point.is_cold or point.tier == "disk") and key in readers:
                        readers.pop(key).close()
                        gc.collect()
                    if key not in readers:
                        readers[key] = make_reader(folders[point], point, load)
                    reader = readers[key]
                    if reader.dtype not in meters:
                        meters[reader.dtype] = LimitMeter(reader.dtype)
                    done = reader.round(point, load, patterns[point.rows][point.skew], number)
                    measure = meters[reader.dtype].measure
                    rounds.add(point, _with_limits(done, reader, point, measure))
                    bar.update()


def _with_limits(
    done: Round, reader: Reader, point: Point, measure: Callable[[], MachineLimits]
) -> Round:
    """The round with the disk's limits, measured now, and the tokens per second of the plan."""
    disk = None
    if reader.disk_tables:
        # without io_uring there are none; the engine has logged that it reads with threads
        with contextlib.suppress(RingError):
            disk = disk_limits(reader.disk_tables[0].location)
    return replace(
        done,
        limit_reads_per_s=None if disk is None else disk.reads_per_s,
        read_latency_s=None if disk is None else disk.latency_s,
        planned_tokens_per_s=planned_tokens_per_s(done, reader, point, measure, disk),
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
    "      rows       tier   dtype    batch prompt skew      cached  cache MiB  tokens/s   planned"
    "  hits  late  stall s  of s  reads/token  disk reads/s"
)


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['rows']:>10} {'own' if result['is_own'] else 'drawn':<5}"
        f" {result['tier']:<6} {result['dtype']:<8} {result['batch']:>5}"
        f" {result['prompt_len'] or '-':>6} {result['skew']:<9}"
        f" {_shown(result['cache_share'], '6.2g')} {result['cache_bytes'] / 2**20:>10.1f}"
        f" {result['tokens_per_s']:>9.1f} {_shown(result['planned_tokens_per_s'], '9.1f')}"
        f" {_shown(result['hit_rate'], '5.2f')}"
        f" {_shown(result['late_rate'], '5.2f')} {_shown(result['stall_s'], '8.3f')}"
        f" {result['seconds']:>5.2f} {_shown(result['reads_per_token'], '12.1f')}"
        f" {_shown(result['limit_reads_per_s'], '13.0f')}"
    )


def _shown(value: float | None, how: str) -> str:
    return "-".rjust(int(how.partition(".")[0])) if value is None else format(value, how)
