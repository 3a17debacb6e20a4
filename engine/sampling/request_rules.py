"""Logit rules of one request, cached between steps, and the sampling rows that they apply to."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.sampling.params import SamplingParams

Ids = NDArray[np.int64]


class RequestRules:
    """The token ids in a request's parameters, and its tokens so far.

    All ids are int64; those of ``token_counts``, ``bias_ids`` and ``allowed_ids`` are distinct.
    """

    def __init__(
        self, params: SamplingParams, prompt_length: int, eos_ids: frozenset[int] = frozenset()
    ) -> None:
        """``eos_ids`` are the ids that ``min_tokens`` forbids besides the stop tokens."""
        self._params = params
        self._prompt_length = prompt_length
        self._history: Sequence[int] = ()
        self._counts: TokenCounts | None = None
        biases = dict(params.logit_bias)
        self.bias_ids = _ids(biases)
        self.bias_values = np.array(list(biases.values()), dtype=np.float32)
        allowed = params.allowed_token_ids
        self.allowed_ids = None if allowed is None else _ids(allowed)
        self._ends = _ids(params.stop_token_ids | eos_ids)
        self._bad_ids = _ids(word[0] for word in params.bad_words if len(word) == 1)
        # by the id before the banned one, so that a step compares few words
        self._bad_words: dict[int, list[tuple[int, ...]]] = {}
        for word in params.bad_words:
            if len(word) > 1:
                self._bad_words.setdefault(word[-2], []).append(word)

    def follow(self, history: Sequence[int]) -> None:
        """Set all tokens so far; they extend those of the last call."""
        if self._params.has_penalties:
            if self._counts is None:
                self._counts = TokenCounts(history[: self._prompt_length])
            self._counts.add(history[self._prompt_length + self._counts.num_added :])
        self._history = history

    def token_counts(self, drafts: Sequence[int]) -> tuple[Ids, NDArray[np.float32]]:
        """The distinct tokens up to the end of ``drafts``, and how often each was generated."""
        assert self._counts is not None
        return self._counts.after(drafts)

    def banned_ids(self, position: int, drafts: Sequence[int]) -> list[Ids]:
        """Ids that are forbidden at ``position``, after the tokens so far and ``drafts``."""
        banned = [self._bad_ids]
        if position - self._prompt_length < self._params.min_tokens:
            banned.append(self._ends)
        if self._bad_words:
            words = self._bad_words.get((drafts or self._history)[-1], ())
            banned += [_ids(word[-1:]) for word in words if self._ends_in(word[:-1], drafts)]
        return [ids for ids in banned if len(ids)]

    def _ends_in(self, wanted: tuple[int, ...], drafts: Sequence[int]) -> bool:
        tail = (*self._history[-len(wanted) :], *drafts)
        return tail[-len(wanted) :] == wanted


class SamplingRow(NamedTuple):
    """Parameters of one token to choose from one row of logits.

    Attributes:
        seed: the request's seed; with ``position`` it determines the random number.
        position: the token's position in the sequence.
        rules: logit rules, if any apply.
        drafts: draft tokens between the sequence's last token and this one.
    """

    params: SamplingParams
    seed: int
    position: int
    rules: RequestRules | None = None
    drafts: tuple[int, ...] = ()


class TokenCounts:
    """The distinct tokens of a growing sequence, and how often each was generated."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._ids = np.unique(_ids(prompt))
        self._size = len(self._ids)
        self._values = np.zeros(self._size, dtype=np.float32)
        self._place = {token_id: place for place, token_id in enumerate(self._ids.tolist())}
        self.num_added = 0

    def add(self, token_ids: Sequence[int]) -> None:
        """Count generated tokens."""
        for token_id in token_ids:
            place = self._place.setdefault(token_id, self._size)
            if place == self._size:
                self._append(token_id)
            self._values[place] += 1
        self.num_added += len(token_ids)

    def after(self, drafts: Sequence[int]) -> tuple[Ids, NDArray[np.float32]]:
        """The distinct ids and their counts, as if ``drafts`` were added."""
        ids, values = self._ids[: self._size], self._values[: self._size]
        if not drafts:
            return ids, values
        new = [token_id for token_id in dict.fromkeys(drafts) if token_id not in self._place]
        ids = np.concatenate((ids, _ids(new)))
        values = np.concatenate((values, np.zeros(len(new), dtype=np.float32)))
        for token_id in drafts:
            place = self._place.get(token_id)
            values[self._size + new.index(token_id) if place is None else place] += 1
        return ids, values

    def _append(self, token_id: int) -> None:
        if self._size == len(self._ids):
            zeros = np.zeros(max(64, self._size), dtype=np.int64)
            self._ids = np.concatenate((self._ids, zeros))
            self._values = np.concatenate((self._values, zeros.astype(np.float32)))
        self._ids[self._size] = token_id
        self._size += 1


def _ids(token_ids: Iterable[int]) -> Ids:
    return np.fromiter(token_ids, dtype=np.int64)
