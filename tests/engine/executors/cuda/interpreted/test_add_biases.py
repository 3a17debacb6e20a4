"""Logit biases and bans: the kernel against its twin in plain torch."""

import pytest
import torch

from engine.executors.cuda.kernels.add_biases import add_biases, add_biases_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 300])
def test_the_first_values_are_added_and_no_other(count, dtype):
    logits_LV = torch.randn(3, 1000).to(dtype)
    places_N = torch.randperm(3000)[:300]
    values_N = torch.randn(300) * 10
    values_N[::5] = -torch.inf
    # past the count, neither places nor values are read
    places_N[count:], values_N[count:] = -(2**60), torch.nan
    wanted_LV, count_1 = logits_LV.clone(), torch.tensor([count])
    add_biases_reference(wanted_LV, places_N, values_N, count_1)
    changed = (wanted_LV != logits_LV).flatten().nonzero().flatten().tolist()
    assert set(changed) <= set(places_N[:count].tolist())
    add_biases(logits_LV, places_N, values_N, count_1)
    assert torch.equal(logits_LV, wanted_LV)


@pytest.mark.parametrize("add", [add_biases, add_biases_reference])
def test_a_ban_holds_for_every_logit(add):
    logits_LV = torch.tensor([[torch.inf, -torch.inf, torch.nan, 3.0, torch.inf, 1.0]])
    values_N = torch.tensor([-torch.inf, -torch.inf, -torch.inf, -torch.inf, 2.0, 0.5])
    add(logits_LV, torch.arange(6), values_N, torch.tensor([6]))
    assert logits_LV.tolist() == [[-torch.inf] * 4 + [torch.inf, 1.5]]


def test_places_for_no_bias():
    logits_LV = torch.zeros(1, 4)
    add_biases(logits_LV, torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.tensor([0]))
    assert not logits_LV.any()
