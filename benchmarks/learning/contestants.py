"""The compared ways to learn: rows by TF-IDF, rows by reads, all rows, all weights, LoRA."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from benchmarks.learning.dense_students import FullStudent, LoraStudent
from benchmarks.learning.task import LearningTask
from weights.learning.learning_config import RowConfig
from weights.learning.row_ranks import chosen_rows
from weights.learning.row_student import RowStudent


@dataclass(frozen=True)
class Contestant:
    """A way to learn.

    Attributes:
        name: its name in the results.
        settings: its other settings.
        lrs: peak learning rates that are tried.
        make: makes its student of a task, with a learning rate; and counts the numbers that may
            change.
    """

    name: str
    settings: Mapping[str, object]
    lrs: tuple[float, ...]
    make: Callable[[LearningTask, float], tuple["AnyStudent", int]]


AnyStudent = RowStudent | FullStudent | LoraStudent


def contestants() -> list[Contestant]:
    """All of them; the first one is what ``memplus learn`` does by default."""
    return [
        _rows("rows", RowConfig()),
        _rows("rows, SGD", RowConfig(optimizer="sgd")),
        _rows("rows by reads", RowConfig(rank="reads")),
        _rows("all rows", RowConfig(rank="all")),
        Contestant("full", {}, (1e-5, *_around(1e-4)), _full),
        _lora(8),
        _lora(32),
    ]


def _around(lr: float) -> tuple[float, ...]:
    return lr / 3, lr, lr * 3


def row_student(task: LearningTask, config: RowConfig) -> RowStudent:
    """A student of the rows that ``config`` chooses for a task."""
    return RowStudent(
        task.base, chosen_rows(task.fact_reads, task.background_reads, config), config
    )


def _rows(name: str, config: RowConfig) -> Contestant:
    def make(task: LearningTask, lr: float) -> tuple[RowStudent, int]:
        student = row_student(task, replace(config, lr=lr))
        tables = student.tables.values()
        return student, sum(len(table.rows_P) * table.value_dim for table in tables)

    return Contestant(name, asdict(config), _around(config.peak_lr), make)


def _full(task: LearningTask, lr: float) -> tuple[FullStudent, int]:
    student = FullStudent(task.base, lr)
    return student, student.num_learned


def _lora(rank: int) -> Contestant:
    def make(task: LearningTask, lr: float) -> tuple[LoraStudent, int]:
        student = LoraStudent(task.base, rank, lr, task.seed)
        return student, student.num_learned

    return Contestant(f"LoRA {rank}", {"rank": rank}, _around(1e-3), make)
