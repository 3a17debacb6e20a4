"""A row student: its steps against torch's optimisers, frozen weights, state and rounding."""

import math

import pytest
import torch

from engine.errors import ConfigError
from tests.weights.learning.learned import FACTS, memory_model
from weights.available_memory import AvailableMemory
from weights.errors import TrainingError
from weights.learning import row_student
from weights.learning.learning_config import RowConfig
from weights.learning.row_student import RowStudent, saved_rows
from weights.training.loss import batch_loss
from weights.training.packing import packed

TABLE = "memory.table"
CHOSEN = torch.arange(0, 64, 2)


def student_of(**config):
    return RowStudent(memory_model(), {TABLE: CHOSEN}, RowConfig(**config))


def backward(student):
    loss = batch_loss(student.model, packed(FACTS), torch.float32).nats
    loss.backward()
    return float(loss.detach())


def plain_gradient(student):
    """Gradient of the chosen rows by finite differences of one value, as a check of the whole."""
    table = student.tables[TABLE].deltas.table_RV
    gradient = torch.zeros(len(CHOSEN))
    with torch.no_grad():
        for row in range(len(CHOSEN)):
            losses = []
            for shift in (1e-2, -1e-2):
                table[row, 3] += shift
                losses.append(float(batch_loss(student.model, packed(FACTS), torch.float32).nats))
                table[row, 3] -= shift
            gradient[row] = (losses[0] - losses[1]) / 2e-2
    return gradient


def test_sgd_follows_the_gradient():
    student = student_of(optimizer="sgd", lr=0.5, clip_norm=0.0)
    wanted = plain_gradient(student)
    backward(student)
    norm = student.step(0.5)
    deltas = student.tables[TABLE].deltas.table_RV
    torch.testing.assert_close(deltas[:-1, 3], -0.25 * wanted, rtol=2e-2, atol=2e-3)
    assert math.isclose(norm, float(deltas.norm()) / 0.25, rel_tol=1e-4)
    assert wanted.abs().max() > 0.01


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_large_gradients_are_clipped(optimizer):
    students = [
        student_of(optimizer=optimizer, lr=0.5, clip_norm=clip) for clip in (0.0, 1e9, 1e-3)
    ]
    norms = []
    for student in students:
        backward(student)
        norms.append(student.step(1.0))
    plain, wide, clipped = (one.tables[TABLE].deltas.table_RV for one in students)
    assert norms[0] == norms[1] == norms[2] > 1e-2 and torch.equal(plain, wide)
    if optimizer == "sgd":
        torch.testing.assert_close(clipped, plain * (1e-3 / norms[0]))
    else:  # the first step of Adam hardly depends on the gradient's size
        assert 0 < float(clipped.norm()) < float(plain.norm())


def test_the_first_step_of_adam_has_the_size_of_the_rate():
    student = student_of(optimizer="adam", lr=0.25)
    backward(student)
    student.step(0.5)
    deltas = student.tables[TABLE].deltas.table_RV
    moved = deltas[deltas.abs() > 1e-3].abs()
    # values with a gradient near eps move less
    assert float(moved.max()) <= 0.125 * 1.0001 and float(moved.median()) > 0.1249
    assert len(moved) > 100 and not deltas[-1].any()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_only_deltas_change(optimizer):
    student = student_of(optimizer=optimizer, lr=0.05)
    base = memory_model()
    first = backward(student)
    for _ in range(6):
        student.step(1.0)
        last = backward(student)
    assert last < first
    for (name, weight), plain in zip(
        student.model.named_parameters(), base.parameters(), strict=True
    ):
        assert torch.equal(weight, plain) and weight.grad is None, name
    with torch.no_grad():
        student.tables[TABLE].deltas.table_RV.zero_()
    assert math.isclose(backward(student), first, rel_tol=1e-6)


def test_rounded_deltas_are_those_that_are_stored():
    student = student_of(delta_dtype="bfloat16")
    backward(student)
    student.step(1 / 3)
    student.finish()
    rows_P, deltas_PV = student.deltas()[TABLE]
    assert rows_P is student.tables[TABLE].rows_P and deltas_PV.dtype == torch.bfloat16
    assert torch.equal(deltas_PV.float(), student.tables[TABLE].deltas.table_RV[:-1])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_state_continues_bit_for_bit(optimizer):
    config = {"optimizer": optimizer, "lr": 0.05}
    student, other = student_of(**config), student_of(**config)
    for step in range(4):
        if step == 2:
            other.load({name: one.clone() for name, one in student.state().items()}, step)
        for one in (student, other) if step >= 2 else (student,):
            backward(one)
            one.step(1.0)
    found = other.tables[TABLE].deltas.table_RV
    assert torch.equal(found, student.tables[TABLE].deltas.table_RV) and found.any()


def test_a_state_of_other_rows_is_refused():
    for rows_P in (CHOSEN[1:], CHOSEN + 1):
        other = RowStudent(memory_model(), {TABLE: rows_P}, RowConfig())
        with pytest.raises(TrainingError, match="the saved state has other rows"):
            student_of().load(other.state(), 1)


def test_saved_rows_are_those_of_the_models_tables():
    base = memory_model()
    assert torch.equal(saved_rows(student_of().state(), base)[TABLE], CHOSEN)
    for name, rows_P, named in [
        ("other", CHOSEN, "other.rows: is not a list of row ids of a table"),
        (TABLE, CHOSEN.int(), "rows: is not a list of row ids"),
        (TABLE, CHOSEN[None], "rows: is not a list of row ids"),
        (TABLE, CHOSEN.flip(0), "rows: row ids must ascend"),
        (TABLE, CHOSEN + 2, "rows: row 64 is outside the table of 64 rows"),
    ]:
        with pytest.raises(TrainingError, match=f"the saved state: .*{named}"):
            saved_rows({f"{name}.rows": rows_P}, base)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_gradients_are_collected_once_before_a_step(optimizer):
    student = student_of(optimizer=optimizer)
    with pytest.raises(AssertionError, match="step was called without collect"):
        student._optimizer.step(0.1)
    student._optimizer.collect()
    with pytest.raises(AssertionError, match="collect was called twice"):
        student._optimizer.collect()


def test_a_table_without_chosen_rows_stays_as_it_is():
    model = memory_model("memory_plus", "dense", "pkm", share_values=False)
    first, second = model.tables
    none = torch.empty(0, dtype=torch.int64)
    student = RowStudent(model, {first: CHOSEN, second: none}, RowConfig())
    assert set(student.tables) == {first}
    assert student.model.tables[second] is model.tables[second]


def test_a_gradient_that_is_not_finite_changes_nothing():
    student = student_of()
    loss = batch_loss(student.model, packed(FACTS), torch.float32).nats * math.inf
    loss.backward()
    with pytest.raises(TrainingError, match="norm is (nan|inf)"):
        student.step(1.0)
    assert not student.tables[TABLE].deltas.table_RV.any()


@pytest.mark.parametrize(
    ("config", "option", "copies"),
    [
        (RowConfig(rank="all"), "rank: all", 4 * 65),
        (RowConfig(rows=32, optimizer="sgd"), "rows: 32", 2 * 33),
    ],
)
def test_rows_that_do_not_fit_in_memory_are_refused(monkeypatch, config, option, copies):
    model, rows = memory_model(), torch.arange(64) if config.rank == "all" else CHOSEN
    # copies of the rows, and the places of 64 rows
    needed = 4 * (copies * model.tables[TABLE].value_dim + 64)
    for free in (needed, needed - 1):
        limit = AvailableMemory(free, "a limit")
        monkeypatch.setattr(row_student, "available_memory", lambda limit=limit: limit)
        if free == needed:
            RowStudent(model, {TABLE: rows}, config)
    with pytest.raises(ConfigError, match=rf"{option} needs [0-9.]+ KiB of memory, .*\(a limit\)"):
        RowStudent(model, {TABLE: rows}, config)
