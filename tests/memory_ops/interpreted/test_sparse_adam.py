"""The Adam step of the rows read against the reference in fp64 and the native CPU kernels."""

import pytest
import torch

from memory_ops import reference
from memory_ops.native.backend import NativeBackend
from memory_ops.native.library import MEMORY_LIBRARY
from memory_ops.sparse_adam import AdamMoments
from memory_ops.triton_kernels import (
    group_rows,
    row_gradients,
    segment_sums,
    sparse_adam,
    squared_norm,
)
from tests.memory_ops.table_kinds import PLAIN
from tests.memory_ops.test_sparse_adam import MOMENTS, STEP, check_moments, doubled, moments, reads


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 reads, so that a few reads of a row fill some."""
    monkeypatch.setattr(segment_sums, "CHUNK", 8)


def clones(state):
    return AdamMoments(*(None if one is None else one.clone() for one in state))


NARROW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp16", "bf16")]


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("grad_kind", ["fp32", *NARROW])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (30, 64), (3, 99), (2, 300)])
@pytest.mark.usefixtures("short_chunks")
def test_a_step_equals_that_of_the_cpu(kind, grad_kind, num_rows, width):
    rows, weights, grad = reads(num_rows, width, 5, 2, 3)
    grad = grad.to(PLAIN[grad_kind])
    groups = reference.group_rows(rows, weights)
    table, state = torch.randn(num_rows, width), moments(num_rows, width, kind)
    before, exact, exact_state = table.clone(), table.double(), doubled(state)
    native, native_state = table.clone(), clones(state)
    reference.sparse_adam(exact, exact_state, groups, grad.double(), STEP)
    sparse_adam(table, state, groups, grad, STEP)
    torch.testing.assert_close(table, exact.float(), rtol=1e-5, atol=1e-6)
    check_moments(state, exact_state)
    others = torch.ones(num_rows, dtype=torch.bool)
    others[groups.rows_U] = False
    assert torch.equal(table[others], before[others])
    if MEMORY_LIBRARY.best_build is not None:
        backend = NativeBackend(MEMORY_LIBRARY.best_build)
        backend.sparse_adam(native, native_state, groups, grad, STEP)
        torch.testing.assert_close(table, native, rtol=1e-5, atol=1e-6)
        check_moments(state, native_state)


@pytest.mark.parametrize("grad_kind", PLAIN)
@pytest.mark.parametrize("width", [1, 300])
@pytest.mark.usefixtures("short_chunks")
def test_the_norm_equals_that_of_the_row_gradients(grad_kind, width):
    rows, weights, grad = reads(4, width, 9, 2, 5)
    grad = grad.to(PLAIN[grad_kind])
    _, sums = reference.row_gradients(rows, weights.double(), grad.double())
    found = squared_norm(reference.group_rows(rows, weights), grad)
    assert found == pytest.approx(float(sums.square().sum()), rel=1e-5)


@pytest.mark.parametrize("counts", [(8,), (7, 9), (24,), (1, 40, 3), (5, 16, 8, 2), (30, 34)])
@pytest.mark.usefixtures("short_chunks")
def test_rows_with_many_reads_are_summed_in_parts(counts):
    # chunks that a row fills, that rows share, and that hold a row's first or last reads
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    weights, grad = torch.randn(len(rows), 1, 1), torch.randn(len(rows), 33)
    rows_U, sums = row_gradients(rows.view(-1, 1, 1), weights, grad)
    wanted, exact = reference.row_gradients(rows.view(-1, 1, 1), weights, grad.double())
    assert torch.equal(rows_U, wanted)
    torch.testing.assert_close(sums, exact.float(), rtol=1e-5, atol=1e-5)


def test_the_sums_of_chunks_are_those_of_a_long_segment():
    # with the shipped chunks
    count = 2 * segment_sums.CHUNK + 30
    rows = torch.zeros(count, 1, 1, dtype=torch.int64)
    weights, grad = torch.randn(count, 1, 1), torch.randn(count, 5)
    _, sums = row_gradients(rows, weights, grad)
    torch.testing.assert_close(sums[0], (weights[:, 0] * grad).double().sum(0).float())


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.usefixtures("short_chunks")
def test_the_same_bits_every_time(kind):
    rows, weights, grad = reads(3, 40, 20, 2, 3)
    groups = reference.group_rows(rows, weights)
    table, state = torch.randn(3, 40), moments(3, 40, kind)
    other, other_state = table.clone(), clones(state)
    for one, its in ((table, state), (other, other_state)):
        sparse_adam(one, its, groups, grad, STEP)
    assert torch.equal(table, other) and torch.equal(state.second, other_state.second)


@pytest.mark.parametrize("kind", MOMENTS)
def test_no_reads_change_nothing(kind):
    rows, weights, grad = reads(3, 4, 0, 2, 3)
    groups = group_rows(rows, weights)
    table = torch.ones(3, 4)
    sparse_adam(table, moments(3, 4, kind), groups, grad, STEP)
    assert torch.equal(table, torch.ones(3, 4)) and squared_norm(groups, grad) == 0


def test_wrong_operands_are_refused():
    rows, weights, grad = reads(9, 8, 4, 2, 3)
    groups = reference.group_rows(rows, weights)
    refused = [
        ("table: expected float32", (torch.zeros(9, 8).half(), moments(9, 8), groups, grad)),
        ("second moment: expected", (torch.zeros(9, 8), moments(8, 8, "row_wise"), groups, grad)),
    ]
    for message, operands in refused:
        with pytest.raises(ValueError, match=message):
            sparse_adam(*operands, STEP)
    with pytest.raises(ValueError, match="grad: the Triton kernels support .*, not torch.float64"):
        squared_norm(groups, grad.double())
