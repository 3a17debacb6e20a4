"""``memplus bench learn``: contestants learn, results resume, and the best rate is chosen."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.learning import run
from benchmarks.learning.composition import compose, together
from benchmarks.learning.contestants import contestants
from benchmarks.learning.people import PeopleTasks
from benchmarks.learning.results import LearningResult, best_lr
from benchmarks.learning.run import LearningRuns
from benchmarks.learning.task import LearningTask
from benchmarks.result_file import read_results
from engine.errors import ConfigError
from engine.model.transformer import with_tables
from memory_ops.row_formats import dequantize_rows, quantize_rows
from memory_ops.tables.device import DeviceTable
from tests.models import feed_forward_changes, random_model, tiny_config
from weights.learning.learning_config import LearningConfig, RowConfig
from weights.learning.row_student import RowStudent
from weights.learning.scores import exact_answers, score_drift
from weights.training.packing import Passage
from weights.training.row_reads import count_reads

FACTS = [Passage((3, 10 + n, 40 + n), num_given=2) for n in range(20)]
TEXTS = [Passage((9, 10 + n, 12, 20 - n)) for n in range(6)]


def draw(count: int, seed: int) -> LearningTask:
    torch.manual_seed(3)
    model = random_model(tiny_config(**feed_forward_changes("dense", "memory_plus")))
    tables = {
        name: DeviceTable(quantize_rows(table.rows, "int8")) for name, table in model.tables.items()
    }
    model.attach_tables(tables)
    facts = FACTS[:count]
    return LearningTask(
        name=f"facts {count}",
        seed=seed,
        base=model,
        facts=facts,
        questions=(),
        known=TEXTS[4:],
        held_out=TEXTS[:2],
        neutral=TEXTS[2:4],
        background=TEXTS[4:],
        fact_reads=count_reads(model, facts),
        background_reads=count_reads(model, TEXTS),
    )


TASKS = SimpleNamespace(num_facts=20, fingerprint={"table": "a hash"}, draw=draw)
ONE = LearningResult(
    task="t",
    contestant="LoRA 8",
    lr=1.0,
    replay_share=0.0,
    seed=0,
    num_learned=1,
    recall=1.0,
    rephrased=0.0,
    lost=0.0,
    lost_held_out=0.0,
    perplexity_before=2.0,
    perplexity=2.0,
    divergence=0.0,
    exact_step=1,
    steps=2,
    seconds=1.0,
)
QUICK = LearningConfig(
    steps=12, warmup_steps=1, cooldown_steps=2, batch_tokens=16, replay_share=0.5
)


@pytest.mark.parametrize("contestant", contestants(), ids=lambda one: one.name)
def test_every_contestant_changes_its_model_and_leaves_the_base_alone(contestant):
    task = draw(2, 0)
    weights = {name: weight.clone() for name, weight in task.base.state_dict().items()}
    result = run.learn(task, contestant, contestant.lrs[-1], QUICK)
    assert result.num_learned > 0 and 2 < result.steps <= 12
    assert result.divergence > 0 and result.perplexity != result.perplexity_before
    for name, weight in task.base.state_dict().items():
        assert torch.equal(weight, weights[name])


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    runs = LearningRuns(tmp_path, "m", [10, 1], 2, [0.0], ["rows", "LoRA 8"], QUICK)
    monkeypatch.setattr(run, "_MOST_RATES", 3)
    run.measure(runs, lambda: TASKS)
    results = read_results(runs.file, LearningResult)
    names = [one.contestant for one in results]
    # three rates on one draw, the best one on two others; ours learns two draws of one fact too
    assert names == ["rows"] * 5 + ["rows"] * 2 + ["LoRA 8"] * 5
    assert len((tmp_path / "composition.csv").read_text().splitlines()) == 3
    assert (tmp_path / "learned.png").stat().st_size > 0
    with pytest.raises(ConfigError, match="has results of other settings"):
        run.measure(replace(runs, learning=replace(QUICK, steps=13)), lambda: TASKS)
    with pytest.raises(ConfigError, match="has results of other settings"):
        run.measure(
            runs, lambda: SimpleNamespace(**vars(TASKS) | {"fingerprint": {"table": "another"}})
        )
    monkeypatch.setattr(run, "learn", None)
    run.measure(runs, lambda: TASKS)
    assert read_results(runs.file, LearningResult) == results


def test_ten_patches_are_learned_apart_and_used_together():
    longer = replace(QUICK, steps=60, replay_share=0.0, batch_tokens=4)
    found = compose(draw(20, 0), longer, RowConfig(optimizer="adam", lr=0.5))
    assert found.alone == 1.0 and found.together > 0


def test_deltas_of_several_students_add_up():
    task = draw(2, 0)
    students, table = [], dict(task.base.tables)
    (name,) = table
    rows_RV = dequantize_rows(table[name].rows)
    for rows_P in (torch.arange(0, 40), torch.arange(20, 60)):
        student = RowStudent(task.base, {name: rows_P}, RowConfig())
        deltas_PV = torch.randn(len(rows_P), 32).bfloat16().float()
        student.tables[name].deltas.table_RV[:-1] = deltas_PV
        rows_RV[rows_P] += deltas_PV
        students.append(student)
    wanted = with_tables(task.base, {name: DeviceTable(rows_RV)})
    drift = score_drift(wanted, together(task.base, students), TEXTS)
    assert drift.divergence == pytest.approx(0, abs=1e-6)
    assert drift.perplexity == pytest.approx(drift.perplexity_before, rel=1e-5)


def test_rates_are_tried_until_the_best_is_between_others(tmp_path, monkeypatch):
    def learn(task, contestant, lr, config):
        rates.append(lr)
        return replace(ONE, task=task.name, lr=lr, seed=task.seed, lost_held_out=abs(lr - 5e-2))

    rates = []
    monkeypatch.setattr(run, "learn", learn)
    monkeypatch.setattr(run, "plot", lambda *_: None)
    run.measure(LearningRuns(tmp_path, "m", [10], 2, [0.0], ["LoRA 8"], QUICK), lambda: TASKS)
    assert rates == pytest.approx([1e-3 / 3, 1e-3, 3e-3, 9e-3, 2.7e-2, 8.1e-2, 2.7e-2, 2.7e-2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ["rowz"]}, "only: 'rowz' is unknown; must be one of rows, "),
        ({"counts": [9]}, "facts: the first number must be at least 10"),
        ({"counts": [10, 0]}, "facts: must be at least 1, not 0"),
        ({"counts": [10, 21]}, "facts: must be at most 20, not 21"),
        ({"seeds": 0}, "seeds: must be 1 to 1000, not 0"),
        ({"replay_shares": [0.5, 1.5]}, r"replay_share: 1.5 is outside \[0, 1\)"),
    ],
)
def test_bad_options_are_refused_before_any_run(tmp_path, changes, message):
    runs = LearningRuns(tmp_path, "m", [10], 1, [0.0], [], QUICK)
    with pytest.raises(ConfigError, match=message):
        run.measure(replace(runs, **changes), lambda: TASKS)
    assert not list(tmp_path.iterdir())


def test_people_are_asked_in_phrasings_that_are_not_learned(memory_plus_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text " * 50)
    tasks = PeopleTasks(memory_plus_folder, [text], [text])
    task = tasks.draw(3, 0)
    assert (len(task.facts), len(task.questions)) == (3 * 4 * 4, 3 * 4 * 2)
    assert not {one.ids for one in task.facts} & {one.ids for one in task.questions}
    answers = {one.ids[one.num_given :] for one in task.facts}
    assert {one.ids[one.num_given :] for one in task.questions} == answers
    assert all(exact_answers(task.base, [*task.known, *task.held_out]))
    assert task.known and task.held_out
    assert [one.ids for one in tasks.draw(3, 0).facts] == [one.ids for one in task.facts]
    assert tasks.num_facts == 256 and set(tasks.fingerprint) >= {"row_choice", "background"}
    with pytest.raises(ConfigError, match="texts are needed"):
        PeopleTasks(memory_plus_folder, [], [text])


def test_the_best_rate_teaches_enough_and_loses_least():
    one = replace(ONE, lost_held_out=0.5)
    enough = replace(one, lr=2.0, recall=0.96, lost_held_out=0.2)
    little = replace(one, lr=3.0, recall=0.9, lost_held_out=0.0)
    less = replace(one, lr=4.0, recall=0.8, lost_held_out=0.0)
    assert best_lr([one, enough, little, less]) == 2.0
    assert best_lr([less, little]) == 3.0
