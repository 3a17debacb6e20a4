"""Speculation: the worth of drafts, the bounds on them, and when a sequence waits for them."""

import pytest

from engine.request import Request, TokenOutput
from engine.sampling.params import SamplingParams
from engine.scheduling.sequence import Sequence
from engine.scheduling.speculation import Speculation
from engine.scheduling.step_plan import SequenceChunk
from tests.engine.test_company import Multiples
from tests.models import VOCAB_SIZE


class Drafting:
    """A drafter that proposes fixed tokens and records what it is asked."""

    def __init__(self, drafts):
        self.drafts, self.asked = drafts, []

    def draft(self, token_ids, count, worth):
        self.asked.append((list(token_ids), count, worth))
        if isinstance(self.drafts, Exception):
            raise self.drafts
        return self.drafts


def speculation(drafts, num_drafts=4) -> tuple[Speculation, Drafting]:
    drafter = Drafting(drafts)
    return Speculation(lambda: drafter, num_drafts, balance_rows=8, vocab_size=VOCAB_SIZE), drafter


def sequence(mask=None) -> Sequence:
    return Sequence(Request("a", (1, 2), SamplingParams()), seed=0, turn=(0, 0), mask=mask)


def chunk(num_tokens: int, samples: bool) -> SequenceChunk:
    ids = (1,) * num_tokens
    return SequenceChunk("a", (0, 0), 0, ids, 0, (0,), SamplingParams(), 0, samples)


@pytest.mark.parametrize(
    ("chunks", "worth"),
    [
        ([chunk(1, True)], 1 / 9),
        ([chunk(1, True)] * 8, 8 / 16),
        # a prompt makes the step long, so an accepted draft saves more
        ([chunk(1, True), chunk(91, False)], 1 / 100),
    ],
)
def test_drafts_are_worth_less_in_a_batch(chunks, worth):
    asking, drafter = speculation([3])
    asking.weigh(chunks)
    assert asking.propose(sequence(), 2) == [3]
    assert drafter.asked == [([1, 2], 2, worth)]


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        ([3, 4, 5, 6, 7, 8], [3, 4, 5, 6]),
        ([3, VOCAB_SIZE, 4], [3]),
        ([-1, 4], []),
        (ValueError("no idea"), []),
    ],
)
def test_drafts_are_bounded_and_a_drafter_may_fail(drafts, expected):
    assert speculation(drafts)[0].propose(sequence(), 9) == expected


def test_a_sequence_without_place_for_drafts_is_not_asked():
    asking, drafter = speculation([3])
    assert asking.propose(sequence(), 0) == [] and not drafter.asked


def test_a_mask_cuts_drafts():
    mask = Multiples()
    assert speculation([3, 4, 5])[0].propose(sequence(mask), 4) == [3, 4]
    assert mask.accepted == []


def test_only_a_sequence_with_drafts_waits_for_its_pending_token():
    with_drafts, without = speculation([3])[0], speculation([])[0]
    waiting = sequence()
    assert not with_drafts.must_wait(waiting)
    waiting.num_pending = 1
    assert with_drafts.must_wait(waiting) and not without.must_wait(sequence())


def test_steps_with_drafts_are_counted():
    counting = speculation([])[0]
    counting.count([TokenOutput("a", (1,)), TokenOutput("b", (1, 2, 3), draft_tokens=4)])
    counting.count([TokenOutput("b", (1, 2), draft_tokens=2, accepted_tokens=1)])
    assert (counting.drafts, counting.draft_tokens, counting.accepted_tokens) == (2, 6, 1)
