"""Prompt lookup equals a naive search, learns what is worth drafting, and never scans its text."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling import ngram_drafter
from engine.scheduling.ngram_drafter import MIN_MATCH, NgramDrafter


class NaiveDrafter:
    """The same matches, found by comparing every earlier end."""

    def __init__(self):
        self.num_known, self.source = 0, None

    def draft(self, ids: list[int], count: int) -> list[int]:
        for at in range(self.num_known, len(ids)):
            if self.source is not None:
                self.source = self.source + 1 if ids[self.source] == ids[at] else None
        self.num_known = len(ids)
        if self.source is None:
            lengths = {end: self._common(ids, end) for end in range(len(ids) - 1, 0, -1)}
            # the first of equal ones is the most recent
            best = max(lengths, key=lengths.get, default=0)
            if lengths.get(best, 0) >= MIN_MATCH:
                self.source = best
        whole = list(ids)
        for at in range(count if self.source is not None else 0):
            whole.append(whole[self.source + at])
        return whole[len(ids) :]

    def _common(self, ids: list[int], end: int) -> int:
        pairs = zip(reversed(ids[:end]), reversed(ids), strict=False)
        equal = next((n for n, (one, other) in enumerate(pairs) if one != other), end)
        return min(equal, ngram_drafter._MEASURED)


@given(
    steps=st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=12),
    count=st.integers(0, 7),
    indexed=st.sampled_from([40, 8192]),
)
def test_drafts_equal_those_of_a_naive_search(steps, count, indexed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram_drafter, "_COMPARED", 1000)
        patch.setattr(ngram_drafter, "_MEASURED", 8)
        patch.setattr(ngram_drafter, "_INDEXED", indexed)
        drafter, naive, ids = NgramDrafter(), NaiveDrafter(), []
        for new in steps:
            ids += new
            assert drafter.draft(ids, count, worth=0.0) == naive.draft(ids, count)
            assert drafter.draft(ids, count, worth=0.0) == naive.draft(ids, count)


def decode(drafter: NgramDrafter, ids: list[int], answer: list[int], worth: float = 1 / 9):
    """Add the answer to ``ids``; return (drafts, accepted drafts) of each step."""
    steps, at = [], 0
    while at < len(answer):
        drafts = drafter.draft(ids, 11, worth)
        coming = answer[at:]
        accepted = next(
            (n for n, (one, other) in enumerate(zip(drafts, coming, strict=False)) if one != other),
            min(len(drafts), len(coming)),
        )
        steps.append((len(drafts), accepted))
        ids += answer[at : at + accepted + 1]
        at += accepted + 1
    return steps


def test_a_copied_prompt_takes_few_steps():
    prompt = random.Random(1).choices(range(1000), k=400)
    steps = decode(NgramDrafter(), [*prompt, 1001], prompt)
    assert len(steps) < 400 / 8
    edited = [1002 if at % 50 == 49 else token_id for at, token_id in enumerate(prompt)]
    assert len(decode(NgramDrafter(), [*prompt, 1001], edited)) < 400 / 5


def test_it_stops_to_draft_what_is_rejected_and_notices_that_a_copy_begins():
    drawn = random.Random(2)
    drafter, ids = NgramDrafter(), drawn.choices(range(16), k=1000)
    # every pair occurred before, and says nothing of the next token
    steps = decode(drafter, ids, drawn.choices(range(16), k=600), worth=1 / 9)
    # by the price of a draft that it is given, it loses less than 3 % of the time
    cost = sum(drafted / 9 - accepted for drafted, accepted in steps)
    assert cost < 0.03 * len(steps)
    copied = ids[200:400]
    assert len(decode(drafter, ids, copied)) < 60


def test_less_likely_drafts_are_worth_less():
    ids = [*range(50), *range(5)]
    lengths = [len(NgramDrafter().draft(ids, 11, worth)) for worth in (0.0, 0.1, 0.3, 0.6, 0.9)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 11 and 0 < lengths[2] < 11 and lengths[-1] == 0


class Counted(list):
    """Counts the items that are read."""

    num_read = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        self.num_read += len(found) if isinstance(place, slice) else 1
        return found


def test_a_step_reads_few_tokens_of_a_long_text():
    ids = Counted(random.Random(3).choices(range(300), k=50_000))
    drafter, largest = NgramDrafter(), 0
    for step in range(300):
        before = ids.num_read
        drafter.draft(ids, 11, 0.0)
        read = ids.num_read - before
        if step > 50_000 // ngram_drafter._INDEXED:
            largest = max(largest, read)
        # pairs of tokens are indexed, a bounded number of them in one step
        assert read <= 2 * ngram_drafter._INDEXED + 1200
        ids.append(7 if step % 3 else step % 300)
    assert largest <= 1200


@pytest.mark.parametrize("ids", [[], [1], [1, 1], [1, 2, 3]])
def test_a_text_that_is_short_or_does_not_repeat_has_no_drafts(ids):
    assert NgramDrafter().draft(ids, 11, 0.0) == []
