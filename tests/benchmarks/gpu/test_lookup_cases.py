"""Inputs of timed lookups: every call reads memory that no other call reads."""

import pytest
import torch

from benchmarks.gpu import lookup_cases
from benchmarks.memory_variant import NUM_HEADS, TOP_K


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_every_call_has_patches_of_its_own_that_fill_a_cache(monkeypatch, num_tokens):
    pytest.importorskip("triton")
    monkeypatch.setattr(lookup_cases, "GPU", torch.device("cpu"))
    *_, case = lookup_cases.lookup_cases(64, 128, num_tokens)
    assert case.name == "row patches bf16"
    calls = [case.inputs() for _ in range(2)]
    patches = [use.patch for call in calls for (use,) in call.arguments[3].sets]
    addresses = {patch.deltas_PV.data_ptr() for patch in patches}
    assert len(addresses) == len(patches) == 2 * min(num_tokens, 8)
    # all rows of the table are in patches, as 2**23 bytes of deltas would be more
    assert all(call.size > 2**15 // 8 * 8 * 64 * 2 for call in calls)
    # a place of the index for each row, and the ids and deltas of the rows that are found
    num_rows = num_tokens * NUM_HEADS * TOP_K
    read = num_rows * (4 + 0.3 * (8 + 64 * 2) + 8 + 4) + 2 * num_tokens * 64 * 4
    assert calls[0].num_bytes == pytest.approx(read, abs=1)
