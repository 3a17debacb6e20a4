"""The kernel that makes dense weights of groups against its twin."""

from inspect import signature

import pytest
import torch

from engine.executors.cuda.kernels.widen_groups import widen_groups, widen_groups_reference
from tests.engine.executors.cuda.group_cases import FORMATS, random_groups
from tests.engine.executors.cuda.padded import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one", FORMATS, ids=str)
@pytest.mark.parametrize("inputs", [1, 32, 100, 2500])
@pytest.mark.parametrize("outputs", [0, 3])
def test_the_dense_copy_is_that_of_the_model(outputs, inputs, one, dtype):
    groups = random_groups(one, 3, inputs).part(slice(outputs))
    found = widen_groups(groups, inputs, dtype)
    assert found.dtype is dtype and found.shape == (outputs, inputs)
    assert torch.equal(found, widen_groups_reference(groups, inputs, dtype))


def test_kernel_and_twin_have_one_signature():
    assert signature(widen_groups) == signature(widen_groups_reference)


def test_groups_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"groups: expected contiguous torch.int8 \[3, 64\]"):
        widen_groups(random_groups(FORMATS[0], 3, 32), 33, torch.float32)
