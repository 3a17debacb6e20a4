"""Tests whether patches that were learned apart still recall their facts when used together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch
from torch import Tensor

from benchmarks.learning.contestants import row_student
from benchmarks.learning.results import share
from benchmarks.learning.task import LearningTask
from engine.model.transformer import Transformer
from weights.learning.learner import Learner
from weights.learning.learning_config import LearningConfig, RowConfig
from weights.learning.row_student import RowStudent
from weights.learning.scores import exact_answers
from weights.training.row_reads import count_reads

NUM_PATCHES = 10


@dataclass(frozen=True)
class Composition:
    """Patches of one draw of facts, a tenth of the facts each.

    Attributes:
        task: model and facts.
        replay_share: part of a step's tokens that was replayed text.
        seed: seed of the draw.
        alone: fraction of its facts that a patch recalls alone; the mean.
        together: the same with all patches added up.
        lost_alone: fraction of the answers known before that one patch loses, of texts that are not
            replayed; the mean.
        lost_together: the fraction that all patches together lose.
    """

    task: str
    replay_share: float
    seed: int
    alone: float
    together: float
    lost_alone: float
    lost_together: float


def compose(task: LearningTask, learning: LearningConfig, rows: RowConfig) -> Composition:
    """Learn ten patches apart, each from a tenth of a task's facts, and add them up."""
    students, alone, lost = [], [], []
    parts = [task.facts[first::NUM_PATCHES] for first in range(NUM_PATCHES)]
    for number, facts in enumerate(parts):
        reads = count_reads(task.base, facts)
        part = replace(task, facts=facts, fact_reads=reads)
        student = row_student(part, rows)
        config = replace(learning, seed=task.seed * NUM_PATCHES + number)
        Learner(student, task.base, facts, task.background, config).run(lambda report: True)
        students.append(student)
        alone.append(share(exact_answers(student.model, facts)))
        lost.append(1 - share(exact_answers(student.model, task.held_out)))
    model = together(task.base, students)
    return Composition(
        task=task.name,
        replay_share=learning.replay_share,
        seed=task.seed,
        alone=mean(alone),
        together=share(exact_answers(model, task.facts)),
        lost_alone=mean(lost),
        lost_together=1 - share(exact_answers(model, task.held_out)),
    )


def together(base: Transformer, students: Sequence[RowStudent]) -> Transformer:
    """The model with the deltas of all students."""
    sums: dict[str, Tensor] = {}
    for student in students:
        for name, (rows_P, deltas_PV) in student.deltas().items():
            table = base.tables[name]
            if name not in sums:
                sums[name] = torch.zeros(table.num_rows, table.value_dim)
            sums[name][rows_P] += deltas_PV.float()
    rows = {name: sum_RV.any(dim=1).nonzero().squeeze(1) for name, sum_RV in sums.items()}
    whole = RowStudent(base, rows, RowConfig())
    for name, table in whole.tables.items():
        table.deltas.table_RV[:-1] = sums[name][table.rows_P]
    return whole.model
