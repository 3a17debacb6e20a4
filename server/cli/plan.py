"""``memplus plan``: memory and speed of a model on a machine, before there is one."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from engine.model.machine_limits import MachineLimits
from server.cli.options import add_options, from_options
from server.config import ThreadOptions, cache_folder
from server.plan.machine import GPUS, DiskLimits, Gpu, Machine, gpu_machine
from server.plan.options import PlanOptions, size
from weights.available_memory import available_memory
from weights.models.named_models import DEFAULT_MODEL


def plan(
    options: argparse.Namespace,
    measure: Callable[[bool], MachineLimits],
    measure_disk: Callable[[Path], DiskLimits | None],
) -> None:
    """Print the memory and the speed that a model has on a machine, by tier of its table.

    ``measure`` gives the limits of this machine's CPU, on request with those of integers, and
    ``measure_disk`` those of the disk that has the tables of a checkpoint folder, if it has any.
    """
    from server.plan.planned_model import planned_model
    from server.plan.prediction import plans
    from server.plan.report import report
    from weights.models.prepare import prepared_folder

    asked = from_options(PlanOptions, options)
    source = Path(options.model)
    if source.suffix != ".json":
        source = prepared_folder(options.model, cache_folder())
    model = planned_model(source, asked, is_on_gpu=asked.gpu is not None)
    is_here = asked.gpu is None and asked.gb_per_s is None
    needs_disk = not asked.is_disk_given and "disk" not in model.refused
    measured = measure_disk(source) if is_here and needs_disk else None
    machine = _machine(asked, partial(measure, model.work.has_groups), asked.disk(measured))
    print(report(options.model, model, machine, asked, plans(model, machine, asked)))


def add_plan(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
    run: Callable[[argparse.Namespace], None],
) -> None:
    """Add ``plan``, which calls ``run``."""
    verb = verbs.add_parser("plan", help=run.__doc__, usage="%(prog)s [OPTION ...] [MODEL]")
    verb.set_defaults(run=run)
    model = "model name, folder, GGUF file, ORG/NAME, or a config.json without weights"
    verb.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=model)
    add_options(verb, PlanOptions)
    add_options(verb, ThreadOptions)


def _machine(
    options: PlanOptions, measure: Callable[[], MachineLimits], disk: DiskLimits
) -> Machine:
    import torch  # takes a second

    memory = None if options.host_memory is None else size("host_memory", options.host_memory)
    ranks = options.tensor_parallel
    if options.gpu is not None:
        gpu = _gpu(options.gpu, options)
        link = options.link(gpu.link_gb_per_s) if ranks > 1 else None
        return gpu_machine(options.gpu, gpu, ranks, memory or 0, disk, link)
    if memory is None:
        memory = available_memory().num_bytes
    name, threads = "this machine", torch.get_num_threads()  # --threads, or those of this machine
    if options.gb_per_s is not None and options.tflops is not None:
        # products of 8-bit integers are twice as fast where processors have them at all
        name = "a CPU"
        limits = MachineLimits(options.gb_per_s, 1e3 * options.tflops, 2e3 * options.tflops)
    else:
        limits = measure()
    link = options.link(limits.gb_per_s / ranks) if ranks > 1 else None
    return Machine(name, memory, limits, disk, ranks, link, threads=threads)


def _gpu(name: str, options: PlanOptions) -> Gpu:
    """One GPU of a kind, with what the options change."""
    gpu = GPUS[name]
    if options.gpu_memory is not None:
        gpu = replace(gpu, memory=size("gpu_memory", options.gpu_memory))
    if options.gb_per_s is not None:
        gpu = replace(gpu, gb_per_s=options.gb_per_s)
    return gpu if options.tflops is None else replace(gpu, tflops=options.tflops)
