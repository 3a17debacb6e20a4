"""Logit rules that a captured step applies itself: biases, and bans of ids that end an answer."""

import numpy as np
from numpy.typing import NDArray

from engine.executors.batch import Batch
from engine.executors.cuda.step_inputs import MOST_BIASES
from engine.sampling.request_rules import SamplingRow

Biases = tuple[NDArray[np.int64], NDArray[np.float64]]


def graph_biases(batch: Batch, vocab_size: int) -> Biases | None:
    """Places in the flat logits and the numbers to add there, -inf for a ban.

    None if the batch needs more: a mask, a rule about earlier tokens, a list of allowed tokens,
    too many biases, or log-probabilities, which are those before any rule.
    """
    ruled = [(index, row) for index, row in enumerate(batch.rows) if row.rules is not None]
    if batch.bitmask is not None or any(_is_beyond(row) for _, row in ruled):
        return None
    if ruled and (any(batch.scored) or any(row.params.logprobs is not None for row in batch.rows)):
        return None
    added: dict[int, float] = {}
    for index, row in ruled:
        assert row.rules is not None
        first = index * vocab_size
        biases = zip(row.rules.bias_ids.tolist(), row.rules.bias_values.tolist(), strict=True)
        added |= {first + token_id: bias for token_id, bias in biases}
        for ids in row.rules.banned_ids(row.position, row.drafts):
            added |= {first + token_id: -np.inf for token_id in ids.tolist()}
    if len(added) > MOST_BIASES:
        return None
    places = np.fromiter(added.keys(), dtype=np.int64, count=len(added))
    return places, np.fromiter(added.values(), dtype=np.float64, count=len(added))


def _is_beyond(row: SamplingRow) -> bool:
    return row.params.needs_history or row.params.allowed_token_ids is not None
