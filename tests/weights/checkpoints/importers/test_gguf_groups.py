"""Groups from blocks of GGUF files against the gguf package's own reading of them."""

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.model.grouped_weights import dense_weights
from weights.checkpoints.importers.gguf_groups import GROUP_FORMATS, block_groups
from weights.errors import CheckpointError

KINDS = gguf.GGMLQuantizationType
NUM_FLOATS = {KINDS.Q8_0: 1, KINDS.Q4_0: 1, KINDS.Q4_1: 2, KINDS.Q4_K: 2}
each_kind = pytest.mark.parametrize("kind", GROUP_FORMATS, ids=lambda kind: kind.name)


def blocks(kind, rows, per_row, seed):
    """A tensor of random blocks with finite scales."""
    rng = np.random.default_rng(seed)
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows, per_row, num_bytes), dtype=np.uint8)
    floats = rng.normal(size=(rows, per_row, NUM_FLOATS[kind])).astype(np.float16)
    data[:, :, : floats.shape[2] * 2] = floats.view(np.uint8)
    data = data.reshape(rows, -1)
    return SimpleNamespace(name="t", data=data, tensor_type=kind, inputs=per_row * size)


@each_kind
@given(rows=st.integers(1, 5), per_row=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_weights_are_those_of_the_gguf_package(kind, rows, per_row, seed):
    tensor = blocks(kind, rows, per_row, seed)
    groups = block_groups(tensor, lambda array: array)
    assert groups.format == GROUP_FORMATS[kind]
    found = dense_weights(groups, tensor.inputs, torch.float32).numpy()
    wanted = gguf.dequantize(tensor.data, kind)
    if kind != KINDS.Q4_K:
        np.testing.assert_array_equal(found, wanted)
        return
    # scale and minimum are rounded to fp16
    scales_OG1, minimums_OG1 = groups.scales_OG.unsqueeze(2), groups.minimums_OG.unsqueeze(2)
    most = (15 * scales_OG1.abs().float() + minimums_OG1.abs().float()) * 2**-11 + 2**-20
    errors = np.abs(found - wanted).reshape(rows, -1, 32)
    assert (errors <= most.numpy()).all()


@each_kind
def test_rows_are_reordered(kind):
    tensor, order = blocks(kind, 4, 2, seed=3), torch.tensor([2, 0, 3, 1])
    found = block_groups(tensor, lambda array: array[order])
    for name, array in block_groups(tensor, lambda array: array).tensors.items():
        assert torch.equal(found.tensors[name], array[order])


@each_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scales_that_are_not_finite_are_refused(kind, bad):
    tensor = blocks(kind, 2, 2, seed=0)
    tensor.data[1, :2] = np.array([bad], dtype=np.float16).view(np.uint8)
    with pytest.raises(CheckpointError, match="tensor t has scales that are NaN or too large"):
        block_groups(tensor, lambda array: array)
