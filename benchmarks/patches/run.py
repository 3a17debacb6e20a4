"""``memplus bench patches``: decode steps with row patches, and loads of patches while serving."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.answer_load import AnswerLoad
from benchmarks.patches.loading import LoadedWhileServing, measure_loading
from benchmarks.patches.options import PatchLoad
from benchmarks.patches.steps import PatchContest, PatchedSteps
from engine.config import EngineConfig
from server.allocator import keep_freed_memory
from server.config import ModelOptions, cache_folder
from server.device import chosen_device
from server.engine_entry import load_served, served_executor
from weights.checkpoints.config_json import read_config
from weights.models.prepare import prepared_folder
from weights.patches.model_identity import check_patchable

_MIB = 2**20


def measure(model: ModelOptions, load: AnswerLoad, patches: PatchLoad) -> None:
    """Print the results, and write them as JSON.

    Raises:
        CheckpointError: the model cannot be read.
        PatchError: the model takes no row patches.
        ConfigError: a number is out of range, or the file's folder does not exist.
    """
    load.check(least_tokens=3)
    keep_freed_memory()
    folder = prepared_folder(model.model, cache_folder())
    steps = _measure_steps(model, folder, load, patches)
    loading = measure_loading(model, folder, max(load.batches), patches.loaded_rows, load.rounds)
    _print_loading(loading)
    if load.json_file is not None:
        results: dict[str, Any] = {"steps": [asdict(one) for one in steps]}
        results["loading"] = asdict(loading)
        load.json_file.write_text(json.dumps(results, indent=1) + "\n")


def _measure_steps(
    model: ModelOptions, folder: Path, load: AnswerLoad, patches: PatchLoad
) -> list[PatchedSteps]:
    config = EngineConfig(
        max_num_seqs=max(load.batches), max_patches=max(patches.many, *load.batches)
    )
    check_patchable(read_config(folder).model, folder)
    loaded = load_served(model, folder, config, chosen_device(model, config))
    executor = served_executor(loaded, config)
    contest = PatchContest(loaded.model, executor, config, load.tokens, load.rounds)
    print(f"{model.model}, {loaded.dtype}, medians of {load.rounds} rounds")
    print("requests  patches  rows each     MiB  resident  held      step overhead   longest  over")
    results: list[PatchedSteps] = []
    for batch in load.batches:
        results.append(contest.own_patches(batch, patches.own_rows))
        print(_line(results[-1]), flush=True)
    for batch in (one for one in load.batches if one <= patches.many):
        results.append(contest.many_patches(batch, patches.many_rows, patches.many))
        print(_line(results[-1]), flush=True)
    return results


def _line(one: PatchedSteps) -> str:
    return (
        f"{one.batch:>8} {one.num_loaded:>8} {one.patch_rows:>10} {one.loaded_bytes / _MIB:>7.1f}"
        f" {one.resident_bytes / _MIB:>9.1f} {one.hit_share:>5.0%} {one.step_ms:>6.2f} ms"
        f" {one.overhead:>8.1%} {one.longest_ms:>6.2f} ms  {one.compared_with}"
    )


def _print_loading(one: LoadedWhileServing) -> None:
    loads = ", ".join(f"{ms:.0f}" for ms in one.load_ms)
    print(
        f"loads of {one.patch_rows} rows ({one.patch_bytes / _MIB:.0f} MiB) beside {one.batch}"
        f" answers: {loads} ms; a token every {one.step_ms:.1f} ms, after at most"
        f" {one.longest_ms:.1f} ms, and {one.longest_loading_ms:.1f} ms while a patch is loaded"
    )
