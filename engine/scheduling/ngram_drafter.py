"""Prompt lookup: drafts the tokens that followed an earlier occurrence of a sequence's end."""

from collections.abc import Sequence

# shortest end of a sequence that is looked up, in tokens
MIN_MATCH = 2
# a search compares at most this many tokens of an occurrence
_MEASURED = 32
# a search compares this many occurrences, the most recent ones; a common pair has thousands
_COMPARED = 16
# a step adds at most this many tokens to the index, which takes a few milliseconds
_INDEXED = 8192
# Probabilities at first that a match continues, by the bit length of its number of tokens: below 4,
# 8, 16, and above. Each sequence learns its own; any similar numbers gave the same speeds.
_PRIOR = (0.0, 0.0, 0.2, 0.5, 0.7, 0.8)
_RATE = 0.1  # weight of a new token in these averages


class NgramDrafter:
    """Drafts from the tokens of one sequence, its prompt and its answer.

    A match is an earlier occurrence of the sequence's last tokens. The drafter follows the longest
    match until it predicts a wrong token; of equal matches it takes the most recent. It compares
    every prediction with the next token, whether that was drafted or not. So it learns at no cost
    how often matches of each length continue, and it drafts only what is likely enough.
    """

    def __init__(self) -> None:
        self._last: dict[int, int] = {}  # pair of tokens -> end of its last occurrence
        self._earlier: list[int] = [0, 0]  # end of a pair -> end of its occurrence before, or 0
        self._num_known = 0  # tokens that were compared with predictions
        self._source = 0  # index of the predicted token
        self._length = 0  # of the match, 0 if there is none
        self._probability = list(_PRIOR)

    def draft(self, token_ids: Sequence[int], count: int, worth: float) -> list[int]:
        """See ``step_plan.Drafter``; calls get the same growing sequence."""
        self._follow(token_ids)
        if not self._length:
            self._find(token_ids)
        drafts: list[int] = []
        end, probability = len(token_ids), 1.0
        for at in range(self._source, self._source + count if self._length else 0):
            probability *= self._probability[_kind(self._length + len(drafts))]
            if probability < worth:
                break
            # a repetition continues beyond the end of the tokens
            drafts.append(token_ids[at] if at < end else drafts[at - end])
        return drafts

    def _follow(self, token_ids: Sequence[int]) -> None:
        """Compare new tokens with those predicted, and add the new pairs to the index."""
        for token_id in token_ids[self._num_known :] if self._length else ():
            kind, is_right = _kind(self._length), token_ids[self._source] == token_id
            self._probability[kind] += _RATE * (is_right - self._probability[kind])
            self._length, self._source = (self._length + 1) * is_right, self._source + 1
            if not is_right:
                break
        self._num_known = len(token_ids)
        first = len(self._earlier)
        for end in range(first, min(len(token_ids), first + _INDEXED)):
            pair = token_ids[end - 2] << 32 | token_ids[end - 1]
            self._earlier.append(self._last.get(pair, 0))
            self._last[pair] = end

    def _find(self, token_ids: Sequence[int]) -> None:
        """Set the match to the longest one of the sequence's end, if any."""
        end = len(token_ids)
        if end < MIN_MATCH:
            return
        source = self._last.get(token_ids[end - 2] << 32 | token_ids[end - 1], 0)
        for _ in range(_COMPARED):
            if not source or self._length == _MEASURED:
                return
            length = MIN_MATCH
            while (
                length < min(source, _MEASURED)
                and token_ids[source - 1 - length] == token_ids[end - 1 - length]
            ):
                length += 1
            if length > self._length:
                self._length, self._source = length, source
            source = self._earlier[source]


def _kind(length: int) -> int:
    return min(length.bit_length(), len(_PRIOR) - 1)
