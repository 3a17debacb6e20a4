"""A part of ``memplus bench gpu``: tasks that share a set-up and yield figures."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.card_limits import CardLimits
from benchmarks.gpu.figures import Figure, FigureFile
from benchmarks.kernel_shapes import Shapes


class Skipped(Exception):
    """A task cannot run on this machine: the message gives the reason."""


@dataclass(frozen=True)
class Task:
    """Figures that share a set-up.

    Attributes:
        names: of the figures.
        run: yields the figures of the given names, each as soon as it is measured. It raises
            ``Skipped`` if the machine lacks what they need.
    """

    names: tuple[str, ...]
    run: Callable[[Sequence[str]], Iterable[Figure]]


@dataclass(frozen=True)
class PartSetup:
    """Inputs from which a part makes its tasks.

    Attributes:
        limits: the measured limits of the card.
        is_core: whether only the core is wanted.
        value: the figure of this part with a name, or None.
        shapes, cache_share: of part lookups.
        trace_file: the recorded access trace.
        served_model: name or folder of the model of part http.
        folder: where figures are saved; part disk writes its table there.
    """

    limits: CardLimits
    is_core: bool
    value: Callable[[str], float | None]
    shapes: Shapes
    cache_share: float
    trace_file: Path
    served_model: str
    folder: Path


Part = Callable[[PartSetup], Iterator[Task]]


def run_tasks(tasks: Iterable[Task], file: FigureFile, *, again: bool) -> bool:
    """Run the tasks whose figures the file lacks, or all of them ``again``; False if one failed.

    A task that fails is reported, and the next one runs.
    """
    is_right = True
    for task in tasks:
        wanted = list(task.names) if again else file.missing(task.names)
        if not wanted:
            continue
        try:
            for figure in task.run(wanted):
                file.add(figure)
                is_right &= not figure.is_wrong
        except Skipped as skipped:
            file.add_skip(wanted[0], str(skipped))
        except Exception as error:
            file.add_failure(wanted[0], one_line(error))
            is_right = False
        # models and tables of this task may fill the memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return is_right


def one_line(error: BaseException) -> str:
    """The first line of an error's message, after its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else '(no message)'}"
