"""Runs the parts of ``memplus bench gpu``, each in its own process: a lost device ends one part."""

import importlib
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.card import Card
from benchmarks.gpu.card_limits import LIMIT_NAMES, CardLimits, measured_limits
from benchmarks.gpu.figures import FigureFile
from benchmarks.gpu.lookups import checked_lookups
from benchmarks.gpu.options import GpuCheck
from benchmarks.gpu.part import Part, PartSetup, Task, one_line, run_tasks
from benchmarks.kernel_shapes import Shapes
from benchmarks.memory_variant import MEMORY_LAYERS, NUM_HEADS, TOP_K
from benchmarks.row_trace import checked_trace
from engine.errors import ConfigError

_CARD = "card"
PART_MODULES = {
    "correctness": "benchmarks.gpu.correctness",
    "kernels": "benchmarks.gpu.kernel_times",
    "decode": "benchmarks.gpu.decode",
    "tables": "benchmarks.gpu.tables",
    "http": "benchmarks.gpu.http_serving",
    "transformers": "benchmarks.gpu.transformers_peer",
    "lookups": "benchmarks.gpu.lookups",
    "disk": "benchmarks.gpu.disk",
}


@dataclass(frozen=True)
class PartJob:
    """One part to run, as a process receives it."""

    name: str
    is_core: bool
    check: GpuCheck
    shapes: Shapes
    trace_file: Path
    folder: Path


def measure(check: GpuCheck, shapes: Shapes, trace_file: Path, folder: Path) -> int:
    """Run the parts that the options name; returns the exit status, 1 if anything failed.

    The limits of the card are measured first, once per folder. ``folder`` gets a file
    ``<part>.jsonl`` for each part.

    Raises:
        ConfigError: torch finds no GPU, triton is missing, or an option is invalid.
        DataError: the trace cannot be read, or has other numbers of layers or heads.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench gpu: torch finds no CUDA device")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("bench gpu: triton is not installed")
    names = [name for name, _ in check.runs]
    if "lookups" in names:
        checked_lookups(shapes, trace_file)
    if "tables" in names or "disk" in names:
        checked_trace(trace_file, (MEMORY_LAYERS, NUM_HEADS, TOP_K))
    folder.mkdir(parents=True, exist_ok=True)
    status = 0
    for name, is_core in ((_CARD, False), *check.runs):
        job = PartJob(name, is_core, check, shapes, trace_file, folder)
        code = in_process(run_part, job)
        if code not in (0, 1):
            FigureFile(folder, name, Card.found()).add_failure(name, f"ended with code {code}")
        if code:
            status = 1
        if code and name == _CARD:
            break
    return status


def in_process(target: Callable[[PartJob], None], job: PartJob) -> int:
    """Call ``target`` in a new process, and return its exit code."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=(job,))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run_part(job: PartJob) -> None:
    """Run one part, and exit with 1 if anything failed."""
    card = Card.found()
    file = FigureFile(job.folder, job.name, card)
    try:
        is_right = run_tasks(_tasks(job, card, file), file, again=job.check.again)
    except Exception as error:
        file.add_failure(job.name, one_line(error))
        is_right = False
    sys.exit(0 if is_right else 1)


def _tasks(job: PartJob, card: Card, file: FigureFile) -> Iterable[Task]:
    if job.name == _CARD:
        return [Task(LIMIT_NAMES, measured_limits)]
    part: Part = importlib.import_module(PART_MODULES[job.name]).tasks
    return part(
        PartSetup(
            CardLimits.of(FigureFile(job.folder, _CARD, card).value),
            job.is_core,
            file.value,
            job.shapes,
            job.check.cache_share,
            job.trace_file,
            job.check.served_model,
            job.folder,
        )
    )
