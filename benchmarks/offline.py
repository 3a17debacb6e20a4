"""``memplus bench offline``: tokens per second of an in-process engine, and its roofline."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from benchmarks.engine_perplexity import perplexity
from benchmarks.engine_rounds import EngineRounds, TimedStep
from benchmarks.gpu.card_limits import gpu_limits
from benchmarks.limit_meter import LimitMeter
from benchmarks.offline_load import OfflineLoad
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.model.machine_limits import MachineLimits
from engine.model.step_work import ModelWork
from server.allocator import keep_freed_memory
from server.config import EngineSettings, cache_folder
from server.device import chosen_device
from server.engine_entry import build_engine
from server.memory_nodes import spread_over_nodes
from server.model_options import ModelOptions
from server.plan.options import EFFICIENCY
from server.plan.step_time import step_seconds
from weights.checkpoints.checkpoint import open_checkpoint, serving_dtype
from weights.checkpoints.packed_formats import packed_formats
from weights.checkpoints.table_loading import table_layouts
from weights.models.adapted_model import find_served
from weights.training.corpus import corpus_files, documents
from weights.training.packing import cut
from weights.training.training_data import checkpoint_text

_WINDOW = 512  # tokens, as in llama.cpp's tool


@dataclass(frozen=True)
class Result:
    """One line of the table, one object of the JSON file: the median round.

    ``tokens`` counts one round. ``limit_ms`` is the roofline: the least time of a step at this
    bandwidth and product rates, which are measured between the rounds. ``planned_tokens_per_s`` is
    the prediction of ``memplus plan`` with these limits; None if a table is not on the device or
    ranks share the model, because this one leaves out reads from elsewhere, and what ranks send.
    """

    phase: str
    batch: int
    tokens: int
    tokens_per_s: float
    ms_per_step: float
    limit_ms: float
    roofline_share: float
    planned_tokens_per_s: float | None
    bandwidth_gb_per_s: float
    product_gflops: float
    integer_gops: float


def measure(
    load: OfflineLoad,
    model: ModelOptions,
    config: EngineConfig,
    json_file: Path | None,
    text: Path | None = None,
) -> None:
    """Print a line per prompt length and per batch; write them as JSON.

    Before them, print the perplexity of ``text``, if one is given.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: the load exceeds the limits of model or engine, the native library is missing,
            or the text is too short.
        DataError: the text cannot be read.
    """
    if config.speculate != "none":
        raise ConfigError("speculate: is measured by `memplus bench speculation`")
    keep_freed_memory()
    spread_over_nodes(os.sched_getaffinity(0))
    device = chosen_device(model, config)
    settings = EngineSettings(
        model, find_served(model.model, model.memory_adapter, cache_folder()), config
    )
    with closing(build_engine(settings, device)) as engine:
        _measure(load, settings, engine, device, json_file, text)


def _measure(
    load: OfflineLoad,
    settings: EngineSettings,
    engine: Engine,
    device: torch.device,
    json_file: Path | None,
    text: Path | None,
) -> None:
    """``measure`` with an engine that has no requests."""
    engine.warm_up()
    rounds = EngineRounds(engine, settings.engine)
    rounds.check(load)
    work, dtype, has_integers = _work(settings, device)
    if device.type == "cpu":
        limits = LimitMeter(dtype, with_integers=has_integers).measure
    else:
        limits = partial(gpu_limits, dtype, device)
    is_planned = settings.model.tensor_parallel == 1 and all(
        table.tier == "device" for table in engine.memory_report()
    )
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    benchmark = _Benchmark(load, rounds, work, limits, threads, is_planned=is_planned)
    print(f"{settings.model.model}, {dtype}, {device}, medians of {load.rounds} rounds")
    if text is not None:
        _print_perplexity(engine, settings.folder.folder, text)
    print(
        "phase    batch  tokens  tokens/s   ms/step  limit ms  share  planned"
        "    GB/s  GFLOP/s   GOP/s"
    )
    results: list[Result] = []
    for result in benchmark.results():
        results.append(result)
        tqdm.write(_line(result))
        if json_file is not None:
            whole = json.dumps([asdict(result) for result in results], indent=1)
            json_file.write_text(whole + "\n")


def _print_perplexity(engine: Engine, folder: Path, file: Path) -> None:
    text = checkpoint_text(folder)
    length = min(_WINDOW, engine.limits.max_model_len)
    prompts = [
        passage.ids
        for document in documents(corpus_files([str(file)]))
        for passage in cut(text.document(document), length - 1)
    ]
    found, count = perplexity(engine, prompts), sum(len(ids) - 1 for ids in prompts)
    print(f"perplexity {found:.4f} of {count} tokens of {file}, in windows of {length}")


def _work(settings: EngineSettings, device: torch.device) -> tuple[ModelWork, torch.dtype, bool]:
    """The model's work per step, its dtype, and whether it has products of integers there."""
    checkpoint, stored = open_checkpoint(settings.folder.folder)
    dtype = serving_dtype(checkpoint, stored, settings.model.dtype)
    row_bytes = 0
    for name in checkpoint.model.table_names:
        # all tables have the same row size
        layouts = table_layouts([stored[name]], settings.model.table_dtype)
        row_bytes = layouts[name].num_bytes // stored[name].shape[0]
    formats = packed_formats(checkpoint.model, stored, settings.model.weight_dtype)
    has_integers = device.type == "cpu" and bool(formats)
    shapes = checkpoint.model, dtype.itemsize, row_bytes
    work = ModelWork(*shapes, formats, settings.engine.kv_dtype, has_integer_products=has_integers)
    return work, dtype, has_integers


def _line(result: Result) -> str:
    planned = result.planned_tokens_per_s
    return (
        f"{result.phase:<7} {result.batch:>6} {result.tokens:>7} {result.tokens_per_s:>9.1f}"
        f" {result.ms_per_step:>9.3f} {result.limit_ms:>9.3f} {result.roofline_share:>6.2f}"
        f" {'-' if planned is None else f'{planned:.1f}':>8}"
        f" {result.bandwidth_gb_per_s:>7.1f} {result.product_gflops:>8.1f}"
        f" {f'{result.integer_gops:.0f}' if result.integer_gops else '-':>7}"
    )


class _Benchmark:
    def __init__(
        self,
        load: OfflineLoad,
        rounds: EngineRounds,
        work: ModelWork,
        measure_limits: Callable[[], MachineLimits],
        threads: int,
        *,
        is_planned: bool,
    ) -> None:
        self._load = load
        self._rounds = rounds
        self._work = work
        self._measure_limits = measure_limits
        self._threads = threads
        self._is_planned = is_planned

    def results(self) -> Iterator[Result]:
        """Time all prompt lengths, then all batches."""
        load = self._load
        num_results = len(load.prompt_lengths) + len(load.batches)
        with tqdm(
            total=num_results * (load.rounds + 1), unit="round", leave=False, disable=None
        ) as bar:
            for length in load.prompt_lengths:
                yield self._result("prefill", 1, partial(self._rounds.warm_prefill, length), bar)
            for batch in load.batches:
                run = partial(self._rounds.decode, batch, load.input_len, load.output_len)
                yield self._result("decode", batch, run, bar)

    def _result(
        self, phase: str, batch: int, run: Callable[[], list[TimedStep]], bar: "tqdm[None]"
    ) -> Result:
        limits: list[MachineLimits] = []
        rounds: list[list[TimedStep]] = []
        for number in range(self._load.rounds + 1):
            limits.append(self._measure_limits())
            steps = run()
            if number:
                rounds.append(steps)
            bar.update()
        median_limits = MachineLimits.median(limits)
        seconds = median(sum(step.seconds for step in steps) for steps in rounds)
        # rounds differ only in seconds
        steps = rounds[0]
        least = sum(
            self._work.of(s.chunks, s.num_logits).least_seconds(median_limits) for s in steps
        )
        planned = sum(
            step_seconds(
                self._work,
                median_limits,
                s.chunks,
                s.num_logits,
                efficiency=EFFICIENCY,
                threads=self._threads,
            )
            for s in steps
        )
        tokens = sum(chunk.count for step in steps for chunk in step.chunks)
        return Result(
            phase=phase,
            batch=batch,
            tokens=tokens,
            tokens_per_s=tokens / seconds,
            ms_per_step=seconds / len(steps) * 1e3,
            limit_ms=least / len(steps) * 1e3,
            roofline_share=least / seconds,
            planned_tokens_per_s=tokens / planned if self._is_planned else None,
            bandwidth_gb_per_s=median_limits.gb_per_s,
            product_gflops=median_limits.gflops,
            integer_gops=median_limits.integer_gops,
        )
