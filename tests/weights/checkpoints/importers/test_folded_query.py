"""Folding of batch norms and score scales into queries, against torch's batch norm."""

import pytest
import torch

from weights.checkpoints.importers.folded_query import BATCH_NORM_EPS, BatchNorm, folded_query


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("has_scale", [False, True])
def test_folded_queries_are_those_of_the_parts(has_norm, has_scale):
    # 3 heads of 4; a variance of almost 0 makes the norm's epsilon count
    linear, norm = torch.nn.Linear(7, 12).double(), torch.nn.BatchNorm1d(12).double().eval()
    assert norm.eps == BATCH_NORM_EPS
    for values in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(values)
    norm.running_var.uniform_(1e-6, 3)
    log_scale, x = torch.randn(3).double(), torch.randn(5, 7).double()
    with torch.no_grad():
        wanted = linear(x)
        if has_norm:
            wanted = norm(wanted)
        if has_scale:
            wanted = (wanted.view(5, 3, 4) * log_scale.exp()[:, None]).flatten(1)
        statistics = norm.weight, norm.bias, norm.running_mean, norm.running_var
        weight, bias = folded_query(
            linear.weight,
            linear.bias,
            BatchNorm(*statistics) if has_norm else None,
            log_scale if has_scale else None,
        )
    torch.testing.assert_close(x @ weight.T + bias, wanted)


def test_narrow_parts_are_folded_in_fp64():
    parts = torch.randn(4, 3).bfloat16(), torch.randn(4).bfloat16()
    for one in folded_query(*parts, None, torch.randn(2).bfloat16()):
        assert one.dtype == torch.float64
