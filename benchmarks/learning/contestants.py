"""The compared ways to learn: rows by TF-IDF, rows by reads, all rows, all weights, LoRA."""

from collections.abc import Callable
from dataclasses import dataclass

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
        lrs: peak learning rates that are tried.
        make: makes its student of a task, with a learning rate; and counts the numbers that may
            change.
    """

    name: str
    lrs: tuple[float, ...]
    make: Callable[[LearningTask, float], tuple["AnyStudent", int]]


AnyStudent = RowStudent | FullStudent | LoraStudent


def contestants() -> list[Contestant]:
    """All of them; the first one is what ``memplus learn`` does by default."""
    adam, sgd = (RowConfig(optimizer=name).peak_lr for name in ("adam", "sgd"))
    return [
        Contestant("rows", _around(adam), _rows("tfidf", "adam")),
        Contestant("rows, SGD", _around(sgd), _rows("tfidf", "sgd")),
        Contestant("rows by reads", _around(adam), _rows("reads", "adam")),
        Contestant("all rows", _around(adam), _rows("all", "adam")),
        Contestant("full", (1e-5, *_around(1e-4)), _full),
        Contestant("LoRA 8", _around(1e-3), _lora(8)),
        Contestant("LoRA 32", _around(1e-3), _lora(32)),
    ]


def _around(lr: float) -> tuple[float, ...]:
    return lr / 3, lr, lr * 3


def row_student(task: LearningTask, config: RowConfig) -> RowStudent:
    """A student of the rows that ``config`` chooses for a task."""
    return RowStudent(
        task.base, chosen_rows(task.fact_reads, task.background_reads, config), config
    )


def _rows(rank: str, optimizer: str) -> Callable[[LearningTask, float], tuple[RowStudent, int]]:
    def make(task: LearningTask, lr: float) -> tuple[RowStudent, int]:
        student = row_student(task, RowConfig(rank=rank, optimizer=optimizer, lr=lr))
        tables = student.tables.values()
        return student, sum(len(table.rows_P) * table.value_dim for table in tables)

    return make


def _full(task: LearningTask, lr: float) -> tuple[FullStudent, int]:
    student = FullStudent(task.base, lr)
    return student, student.num_learned


def _lora(rank: int) -> Callable[[LearningTask, float], tuple[LoraStudent, int]]:
    def make(task: LearningTask, lr: float) -> tuple[LoraStudent, int]:
        student = LoraStudent(task.base, rank, lr, task.seed)
        return student, student.num_learned

    return make
