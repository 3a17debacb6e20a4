"""Weights read straight to a device equal those of mapped files."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.model_weights import (
    dense_mapped_weights,
    device_weights,
    mapped_weights,
    weight_bytes,
)
from weights.checkpoints.tensor_files import list_file
from weights.errors import CheckpointError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def stored(tmp_path):
    """The stored weights of a model with memory, mixture and dense layers."""
    changes = feed_forward_changes("memory_plus", "moe", "dense")
    folder = save_model(random_model(tiny_config(**changes)), tmp_path / "model")
    config, tensors = open_checkpoint(folder)
    return {n: one for n, one in tensors.items() if n not in config.model.table_names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_of_a_device_are_those_of_the_files(stored, dtype):
    found = device_weights(stored, dtype, CPU, {})
    wanted = dense_mapped_weights(stored, dtype, {})
    assert found.keys() == wanted.keys() == stored.keys()
    for name, weight in wanted.items():
        assert found[name].dtype is dtype and torch.equal(found[name], weight)
    assert sum(one.nbytes for one in found.values()) == weight_bytes(stored, dtype, {})


def test_mapped_weights_keep_their_dtypes(stored):
    assert {one.dtype for one in mapped_weights(stored).values()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_converts_weights_as_the_host_does(stored, dtype):
    found = device_weights(stored, dtype, GPU, {})
    wanted = dense_mapped_weights(stored, dtype, {})
    for name, weight in wanted.items():
        assert found[name].device == GPU and torch.equal(found[name].cpu(), weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, dtype, value):
    weight = torch.randn(300, 70).to(dtype)
    weight[123, 45] = value
    save_file({"fine": torch.ones(3), "model.norm.weight": weight}, tmp_path / "a.safetensors")
    stored = {one.name: one for one in list_file(tmp_path / "a.safetensors")}
    for load in (
        partial(mapped_weights, stored),
        partial(dense_mapped_weights, stored, dtype, {}),
        partial(device_weights, stored, dtype, CPU, {}),
    ):
        with pytest.raises(CheckpointError, match=r"a.safetensors: tensor model.norm.weight has"):
            load()
