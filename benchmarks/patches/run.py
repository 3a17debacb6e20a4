"""``memplus bench patches``: decode steps with row patches, and loads of patches while serving."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.answer_load import AnswerLoad
from benchmarks.patches.loading import LoadedWhileServing, measure_loading
from benchmarks.patches.options import PatchLoad
from benchmarks.patches.steps import PatchContest, PatchedSteps
from engine.config import EngineConfig
from server.allocator import keep_freed_memory
from server.config import cache_folder
from server.device import chosen_device
from server.model_loading import load_served, served_executor
from server.model_options import ModelOptions
from weights.checkpoints.config_json import read_config
from weights.models.prepare import prepared_folder
from weights.patches.model_identity import check_patchable

_MIB = 2**20


def measure(model: ModelOptions, load: AnswerLoad, patches: PatchLoad) -> None:
    """Print each result as soon as it is measured, and write all so far as JSON.

    Raises:
        CheckpointError: the model cannot be read.
        PatchError: the model takes no row patches, or patches could not be loaded while serving.
        ConfigError: a number is out of range.
        EngineStartError: the server did not start.
    """
    load.check(least_tokens=3)
    keep_freed_memory()
    folder = prepared_folder(model.model, cache_folder())
    num_rows = _check_sizes(folder, patches)
    results: dict[str, list[Any]] = {"steps": [], "loading": []}

    def keep(part: str, line: str, one: PatchedSteps | LoadedWhileServing) -> None:
        print(line, flush=True)
        results[part].append(asdict(one))
        if load.json_file is not None:
            load.json_file.write_text(json.dumps(results, indent=1) + "\n")

    for steps in _measure_steps(model, folder, load, patches):
        keep("steps", _steps_line(steps), steps)
    count = patches.rows_to_load(num_rows)
    for loads in measure_loading(model, folder, load.batches, count, load.rounds):
        keep("loading", _loading_line(loads), loads)


def _check_sizes(folder: Path, patches: PatchLoad) -> int:
    """The rows of all tables of a model that patches of these sizes fit.

    Raises:
        ConfigError: they do not fit it.
        PatchError: the model takes no row patches.
    """
    config = read_config(folder).model
    check_patchable(config, folder)
    assert config.memory is not None
    num_tables = len(config.table_names)
    num_rows = num_tables * config.memory.num_rows
    patches.check(num_tables, num_rows)
    return num_rows


def _measure_steps(
    model: ModelOptions, folder: Path, load: AnswerLoad, patches: PatchLoad
) -> Iterator[PatchedSteps]:
    config = EngineConfig(
        max_num_seqs=max(load.batches), max_patches=max(patches.many, *load.batches)
    )
    loaded = load_served(model, folder, config, chosen_device(model, config))
    executor = served_executor(loaded, config)
    contest = PatchContest(loaded.model, executor, config, load.tokens, load.rounds)
    print(f"{model.model}, {loaded.dtype}, medians of {load.rounds} rounds")
    print("requests  patches  rows each     MiB  resident  held      step overhead   longest  over")
    for batch in load.batches:
        yield contest.own_patches(batch, patches.own_rows)
    for batch in (one for one in load.batches if one <= patches.many):
        yield contest.many_patches(batch, patches.many_rows, patches.many)


def _steps_line(one: PatchedSteps) -> str:
    return (
        f"{one.batch:>8} {one.num_loaded:>8} {one.patch_rows:>10} {one.loaded_bytes / _MIB:>7.1f}"
        f" {one.resident_bytes / _MIB:>9.1f} {one.hit_share:>5.0%} {one.step_ms:>6.2f} ms"
        f" {one.overhead:>8.1%} {one.longest_ms:>6.2f} ms  {one.compared_with}"
    )


def _loading_line(one: LoadedWhileServing) -> str:
    return (
        f"{one.patch_rows} rows ({one.patch_bytes / _MIB:.0f} MiB) loaded during {one.batch}"
        f" answers: median {one.median_load_ms:.0f} ms, longest {one.longest_load_ms:.0f} ms;"
        f" a token every {one.step_ms:.1f} ms, after at most {one.longest_ms:.1f} ms, and"
        f" {one.longest_loading_ms:.1f} ms while a patch is loaded"
    )
