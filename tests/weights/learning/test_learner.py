"""The learning loop: it learns, cools down, keeps text with replay, resumes and stops."""

import json
import math
from dataclasses import replace

import pytest
import torch

from memory_ops.tables.trained import TableReads
from tests.weights.learning.learned import BACKGROUND, FACTS, LEARNING, ROWS, memory_model
from weights.errors import TrainingError
from weights.learning.learner import Learner
from weights.learning.row_student import RowStudent
from weights.learning.scores import exact_answers, score_drift

TABLE = "memory.table"


def learner_of(background=BACKGROUND, config=LEARNING, rows=ROWS, facts=FACTS):
    base = memory_model("dense", "memory_plus")
    student = RowStudent(base, {TABLE: torch.arange(64)}, rows)
    return Learner(student, base, facts, background, config), student, base


def run(learner, until=None):
    reports = []

    def on_step(report):
        reports.append(report)
        return report.step != until

    learner.run(on_step)
    return reports


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_answers_are_learned_then_the_rate_falls(precision, weight):
    config = replace(LEARNING, precision=precision, divergence_weight=weight)
    learner, student, _ = learner_of(config=config)
    reports = run(learner)
    assert learner.is_finished and all(exact_answers(student.model, FACTS))
    assert learner.exact_step is not None and learner.step == learner.exact_step + 5 < 80
    assert [report.lr_share for report in reports[:3]] == [0.5, 1.0, 1.0]
    shares = [report.lr_share for report in reports if report.is_cooling]
    assert shares == [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert reports[-1].loss < reports[0].loss and reports[-1].exact == 1.0
    assert [report.step for report in reports] == [*range(1, learner.step + 1)]


def test_a_cool_down_within_the_warm_up_begins_at_the_rate_that_was_reached():
    learner, _, _ = learner_of(config=replace(LEARNING, warmup_steps=60))
    reports = run(learner)
    reached = learner.exact_step / 60
    shares = [report.lr_share for report in reports if report.is_cooling]
    assert reached < 1 and reports[learner.exact_step - 1].lr_share == reached
    assert shares == pytest.approx([reached * left / 6 for left in (5, 4, 3, 2, 1)])


def test_replay_of_text_keeps_it():
    drifts = []
    for background in ((), BACKGROUND):
        learner, student, base = learner_of(background, replace(LEARNING, cooldown_steps=30))
        reports = run(learner)
        assert all(exact_answers(student.model, FACTS))
        assert any(report.replay_loss for report in reports) == bool(background)
        drifts.append(score_drift(base, student.model, BACKGROUND).divergence)
    assert drifts[1] < drifts[0] / 2


def test_the_steps_end_even_if_answers_stay_wrong():
    config = replace(LEARNING, steps=9, cooldown_steps=3)
    learner, _, _ = learner_of(config=config, rows=replace(ROWS, lr=1e-6))
    reports = run(learner)
    assert learner.step == 9 and learner.exact_step is None
    assert [report.is_cooling for report in reports] == [False] * 6 + [True] * 3


def test_without_a_cool_down_it_ends_when_answers_are_exact():
    learner, _, _ = learner_of(config=replace(LEARNING, cooldown_steps=0))
    assert not run(learner)[-1].is_cooling and learner.step == learner.exact_step


@pytest.mark.parametrize("until", [1, 7, "cooling"])
def test_a_stopped_run_continues_bit_for_bit(until):
    whole, wanted, _ = learner_of()
    reports = run(whole)
    if until == "cooling":
        until = whole.exact_step + 2
    first, student, _ = learner_of()
    before = run(first, until)
    second, resumed, _ = learner_of()
    resumed.load(student.state(), first.step)
    second.resume(json.loads(json.dumps(first.progress())))
    assert before + run(second) == reports
    assert torch.equal(resumed.tables[TABLE].deltas.table_RV, wanted.tables[TABLE].deltas.table_RV)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"},
        {"step": -1},
        {"exact_step": 9},
        {"has_missed": None},
        {"facts": 3},
        {"facts": [0, len(FACTS)]},
        {"replay": None},
        {"replay": [0, 1.5]},
        {"more": 1},
    ],
)
def test_malformed_progress_is_refused(change):
    learner, _, _ = learner_of()
    with pytest.raises(TrainingError, match="the saved state has no valid progress"):
        learner.resume(learner.progress() | {"facts": [0, 1], "replay": [0, 1]} | change)
    with pytest.raises(TrainingError, match="no valid progress"):
        learner.resume({})


def test_seeds_give_other_orders():
    runs = [run(learner_of(config=replace(LEARNING, seed=seed))[0], 3) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def drawn_reads():
    return torch.zeros(1, 2, 3, dtype=torch.int64), torch.ones(1, 2, 3)


def test_a_loss_that_is_not_finite_names_its_step():
    learner, student, _ = learner_of()
    student.tables[TABLE].deltas.table_RV.fill_(math.nan)
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        run(learner)
    learner, student, _ = learner_of()
    learner.run(lambda report: False)
    for reads in student.tables.values():
        reads.deltas.reads.append(TableReads(*drawn_reads(), torch.full((1, 32), math.inf)))
    with pytest.raises(TrainingError, match="step 2: the gradients' norm is"):
        run(learner)
