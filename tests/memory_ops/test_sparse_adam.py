"""Grouped reads and the Adam step of the rows read, in every native build."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_ops import operations, reference
from memory_ops.native.backend import NativeBackend
from memory_ops.sparse_adam import AdamMoments, AdamStep
from tests.memory_ops.builds import each_build
from tests.memory_ops.table_kinds import PLAIN

MOMENTS = ("fp32", "bf16", "row_wise")
STEP = AdamStep(scale=0.7, step_size=1e-2, beta1=0.9, beta2=0.99, eps=1e-8)
SHAPES = {
    "num_rows": st.sampled_from([1, 5, 300]),
    "width": st.one_of(st.integers(1, 40), st.sampled_from([128, 129, 256])),
    "num_tokens": st.sampled_from([0, 1, 2, 33]),
    "num_heads": st.integers(1, 3),
    "top_k": st.sampled_from([1, 2, 7]),
}


def reads(num_rows, width, num_tokens, num_heads, top_k):
    rows = torch.randint(0, num_rows, (num_tokens, num_heads, top_k))
    weights = torch.randn(num_tokens, num_heads, top_k)
    return rows, weights, torch.randn(num_tokens, width)


def moments(num_rows, width, kind="fp32"):
    """Moments of a kind of MOMENTS."""
    if kind == "row_wise":
        return AdamMoments(None, torch.rand(num_rows))
    values = torch.randn(2, num_rows, width).to(PLAIN[kind])
    return AdamMoments(values[0], values[1].abs())


def doubled(given):
    return AdamMoments(*(None if one is None else one.double() for one in given))


def check_moments(found, exact):
    """Assert equal moments: bf16 ones up to a rounding that falls to the other side."""
    for one, other in zip(found, exact, strict=True):
        if one is not None:
            rtol = 2**-7 if one.dtype is torch.bfloat16 else 1e-4
            torch.testing.assert_close(one, other.to(one.dtype), rtol=rtol, atol=1e-6)


@each_build
@given(**SHAPES)
def test_reads_of_one_row_are_grouped(build, **shape):
    rows, weights, _ = reads(**shape)
    found, wanted = (
        backend.group_rows(rows, weights) for backend in (NativeBackend(build), reference)
    )
    for name in ("rows_U", "starts_U1", "tokens_L", "weights_L"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


@each_build
@given(kind=st.sampled_from(list(PLAIN)), **SHAPES)
def test_the_norm_equals_that_of_the_row_gradients(build, kind, **shape):
    rows, weights, grad = reads(**shape)
    grad = grad.to(PLAIN[kind])
    backend = NativeBackend(build)
    _, sums = reference.row_gradients(rows, weights.double(), grad.double())
    found = backend.squared_norm(backend.group_rows(rows, weights), grad)
    assert found == pytest.approx(float(sums.square().sum()), rel=1e-5)


@each_build
@given(kind=st.sampled_from(MOMENTS), **SHAPES)
def test_a_step_is_exact_and_changes_only_the_rows_read(build, kind, **shape):
    rows, weights, grad = reads(**shape)
    groups = reference.group_rows(rows, weights)
    table = torch.randn(shape["num_rows"], shape["width"])
    state = moments(shape["num_rows"], shape["width"], kind)
    exact, exact_state = table.double(), doubled(state)
    before = table.clone()
    reference.sparse_adam(exact, exact_state, groups, grad.double(), STEP)
    NativeBackend(build).sparse_adam(table, state, groups, grad, STEP)
    torch.testing.assert_close(table, exact.float(), rtol=1e-5, atol=1e-6)
    check_moments(state, exact_state)
    others = torch.ones(shape["num_rows"], dtype=torch.bool)
    others[groups.rows_U] = False
    assert torch.equal(table[others], before[others])


@each_build
@pytest.mark.parametrize("kind", MOMENTS)
def test_the_rows_of_groups_may_have_any_order(build, kind):
    rows, weights, grad = reads(9, 17, 8, 2, 3)
    groups, backend = reference.group_rows(rows, weights), NativeBackend(build)
    table, state = torch.randn(9, 17), moments(9, 17, kind)
    places_R = torch.randperm(9)  # of each row in the copies
    table_copy, copies = torch.empty_like(table), [None if m is None else m.clone() for m in state]
    table_copy[places_R] = table
    for copy, one in zip(copies, state, strict=True):
        if copy is not None:
            copy[places_R] = one
    placed = replace(groups, rows_U=places_R[groups.rows_U])
    backend.sparse_adam(table_copy, AdamMoments(*copies), placed, grad, STEP)
    backend.sparse_adam(table, state, groups, grad, STEP)
    assert torch.equal(table_copy[places_R], table)
    for copy, one in zip(copies, state, strict=True):
        assert copy is None or torch.equal(copy[places_R], one)


def test_many_steps_equal_torchs_sparse_adam():
    lr, betas, eps = 1e-2, (0.9, 0.99), 1e-8
    ours = torch.randn(40, 24)
    state = AdamMoments(torch.zeros_like(ours), torch.zeros_like(ours))
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.SparseAdam([theirs], lr=lr, betas=betas, eps=eps)
    for number in range(1, 20):
        rows, weights, grad = reads(40, 24, 3, 2, 4)
        groups = operations.group_rows(rows, weights)
        operations.sparse_adam(ours, state, groups, grad, AdamStep.at(number, lr, betas, eps))
        out = operations.gather_rows(theirs, rows, weights)
        out.backward(grad)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


@each_build
def test_the_norm_does_not_depend_on_the_number_of_threads(build):
    rows, weights, grad = reads(300, 33, 64, 4, 8)
    backend = NativeBackend(build)
    groups, threads = backend.group_rows(rows, weights), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(backend.squared_norm(groups, grad))
    finally:
        torch.set_num_threads(threads)
    assert len(set(found)) == 1


@pytest.mark.parametrize("backend", [reference, operations], ids=["reference", "operations"])
def test_mismatched_operands_are_refused(backend):
    rows, weights, grad = reads(9, 8, 4, 2, 3)
    rows[0, 0, 0] = 8
    groups = backend.group_rows(rows, weights)
    table, state = torch.zeros(9, 8), moments(9, 8)
    narrow, one_of_half = moments(9, 8, "bf16"), AdamMoments(None, torch.zeros(9).bfloat16())
    refused = [
        (ValueError, "grad: token 3 needs a gradient", (table, state, groups, grad[:3])),
        (ValueError, "grad: expected", (table, state, groups, grad[:, :7])),
        (ValueError, "table: expected float32", (table.half(), state, groups, grad)),
        (ValueError, "first moment: expected", (table, moments(9, 7), groups, grad)),
        (ValueError, "first moment: expected", (table.double(), narrow, groups, grad)),
        (ValueError, "second moment: .*float32", (table, one_of_half, groups, grad)),
        (ValueError, "contiguous", (torch.zeros(8, 9).t(), state, groups, grad)),
        (IndexError, "rows: 8 is outside", (table[:8], moments(8, 8), groups, grad)),
    ]
    for error, message, arguments in refused:
        with pytest.raises(error, match=message):
            backend.sparse_adam(*arguments, STEP)
    with pytest.raises(IndexError, match="rows: -1"):
        backend.group_rows(torch.full((1, 1, 1), -1), torch.ones(1, 1, 1))
