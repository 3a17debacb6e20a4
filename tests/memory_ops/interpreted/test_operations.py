"""The public operations on the Triton backend, with gradients."""

import pytest
import torch
from torch.nn import functional

from memory_ops import backends, operations, reference, triton_kernels
from tests.memory_ops.table_kinds import KINDS, check_close, exact_values, rows_of, table_of


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_for_device_type", lambda device_type: triton_kernels)


def test_a_gpu_runs_these_kernels(monkeypatch):
    monkeypatch.undo()
    assert backends._for_device_type("cuda") is triton_kernels


@pytest.mark.parametrize("kind", KINDS)
def test_peer_experts_combine_the_other_kernels(kind):
    down, up = table_of(kind, torch.randn(20, 40)), table_of(kind, torch.randn(20, 70))
    rows, weights, x = rows_of(up, 3, 2, 5), torch.rand(3, 2, 5), torch.randn(3, 40)
    out = operations.expert_lookup(down, up, rows, weights, x)
    activations = functional.gelu(reference.row_dots(exact_values(down), rows, x))
    check_close(out, reference.gather_rows(exact_values(up), rows, weights * activations), 10 * 40)


def test_gradients_of_a_whole_lookup():
    scores, table, given = torch.randn(3, 2, 2, 6), torch.randn(36, 50), torch.randn(3, 50)

    def gradients(operations, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (scores, table)]
        out = operations.gather_rows(leaves[1], *operations.product_topk(leaves[0], 5))
        return torch.autograd.grad(out, leaves, given.to(dtype))

    by_scores, by_table = gradients(operations, torch.float32)
    exact_by_scores, exact_by_table = gradients(reference, torch.float64)
    check_close(by_scores, exact_by_scores, 10 * 50)
    check_close(by_table.to_dense(), exact_by_table, 30)
