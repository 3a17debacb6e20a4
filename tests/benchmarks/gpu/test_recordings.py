"""Recorded and uniform rows for a replay."""

import numpy as np
import pytest
import torch

from benchmarks.gpu.recordings import STEPS, recording
from benchmarks.row_trace import AccessTrace

TOKENS, LAYERS, HEADS, TOP_K, NUM_ROWS = 4096, 3, 1, 2, 2**12


@pytest.fixture(scope="module")
def trace():
    # row 2 t of token t in every layer, so that rows name positions
    rows = np.broadcast_to(np.arange(TOKENS)[:, None, None, None], (TOKENS, LAYERS, HEADS, TOP_K))
    return AccessTrace(rows.copy(), np.ones((LAYERS, NUM_ROWS), dtype=np.int64), TOKENS)


def test_no_position_is_read_twice_and_none_of_the_warm_up(trace):
    read = []
    for batch, steps in STEPS.items():
        decode, warm = recording(trace, "recorded", NUM_ROWS, batch)
        assert decode.shape == (steps, LAYERS, batch, HEADS, TOP_K)
        positions = decode[:, 0, :, 0, 0]
        # each sequence reads successive positions
        assert (positions.diff(dim=0) == 1).all()
        read += positions.flatten().tolist()
        assert torch.equal(warm[:, 0, 0, 0], torch.arange(TOKENS // 2))
    assert len(set(read)) == len(read) <= TOKENS // 2 and min(read) >= TOKENS // 2


def test_uniform_rows_fill_the_table_and_repeat_by_batch(trace):
    decode, warm = recording(trace, "uniform", 2**20, 8)
    assert decode.shape == (STEPS[8], LAYERS, 8, HEADS, TOP_K) and decode.max() > 2**19
    assert warm.shape == (TOKENS // 2, LAYERS, HEADS, TOP_K)
    assert torch.equal(recording(trace, "uniform", 2**20, 8).decode_SMBHK, decode)
    assert not torch.equal(recording(trace, "uniform", 2**20, 64).warm_NMHK, warm)
