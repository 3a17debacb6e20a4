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
    rates = RowConfig.lr / 3, RowConfig.lr, RowConfig.lr * 3
    return [
        Contestant("rows", rates, _rows("tfidf")),
        Contestant("rows by reads", rates, _rows("reads")),
        Contestant("all rows", rates, _rows("all")),
        Contestant("full", (1e-4, 3e-4, 1e-3), _full),
        Contestant("LoRA 8", (3e-4, 1e-3, 3e-3), _lora(8)),
        Contestant("LoRA 32", (3e-4, 1e-3, 3e-3), _lora(32)),
    ]


def row_student(task: LearningTask, config: RowConfig) -> RowStudent:
    """A student of the rows that ``config`` chooses for a task."""
    return RowStudent(
        task.base, chosen_rows(task.fact_reads, task.background_reads, config), config
    )


def _rows(rank: str) -> Callable[[LearningTask, float], tuple[RowStudent, int]]:
    def make(task: LearningTask, lr: float) -> tuple[RowStudent, int]:
        student = row_student(task, RowConfig(rank=rank, lr=lr))
        tables = student.tables.values()
        return student, sum(len(table.rows_P) * table.value_dim for table in tables)

    return make


def _full(task: LearningTask, lr: float) -> tuple[FullStudent, int]:
    student = FullStudent(task.base, lr, table_lr=RowConfig.lr * lr / 3e-4)
    return student, student.num_learned


def _lora(rank: int) -> Callable[[LearningTask, float], tuple[LoraStudent, int]]:
    def make(task: LearningTask, lr: float) -> tuple[LoraStudent, int]:
        student = LoraStudent(task.base, rank, lr)
        return student, student.num_learned

    return make
