"""Bitmasks of a step: rows in order, drafts, and masks that fail."""

import numpy as np
import pytest

from engine.sampling.masks import Grammars
from engine.sampling.step_bitmasks import SampledRows, StepBitmasks
from tests.engine.test_company import Breaking, Multiples
from tests.models import VOCAB_SIZE


def rows(*parts):
    bitmask = StepBitmasks(VOCAB_SIZE, Grammars()).start(parts).result()
    bits = np.unpackbits(bitmask.view(np.uint8), axis=1, bitorder="little")[:, :VOCAB_SIZE]
    return [row.nonzero()[0].tolist() for row in bits]


def test_rows_are_in_order_and_masks_stay_unchanged():
    everything = list(range(VOCAB_SIZE))
    threes, fours = everything[::3], everything[::4]
    mask, drafted = Multiples(), Multiples()
    mask.accept([3])
    found = rows(
        SampledRows(0, None),
        SampledRows(2, None),
        SampledRows(1, mask),
        SampledRows(3, drafted, (3, 4)),
        SampledRows(1, None),
    )
    assert found == [everything, everything, fours, threes, fours, threes, everything]
    assert mask.accepted == [3] and drafted.accepted == []


def test_a_step_without_masks_needs_no_bitmask():
    assert StepBitmasks(VOCAB_SIZE, Grammars()).start([SampledRows(2, None)]) is None


def test_a_mask_that_fails_allows_nothing():
    failing, other = Breaking(), Multiples()
    failing.accept([3, 4])
    found = rows(SampledRows(1, failing), SampledRows(1, other))
    assert found == [[], list(range(0, VOCAB_SIZE, 3))]


def test_a_mask_is_rolled_back_when_a_draft_fails():
    mask = Multiples()
    with pytest.raises(AssertionError, match="not allowed"):
        rows(SampledRows(4, mask, (3, 4, 5)))
    assert mask.accepted == []
