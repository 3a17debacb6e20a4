"""Applies penalties, biases, bans and masks to logits before a token is chosen.

The rules of a whole batch are (place in the flat logits, value) pairs, so that few tensor
operations apply them all, and only to the logits that a rule names.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.request_rules import Ids, RequestRules, SamplingRow

Ruled = list[tuple[int, SamplingRow, RequestRules]]


def apply_rules(
    logits_LV: Tensor, rows: Sequence[SamplingRow], bitmask: NDArray[np.uint32] | None
) -> None:
    """Change ``logits_LV`` (fp32, contiguous) in place, in the order of ``SamplingParams``."""
    ruled: Ruled = [(i, row, row.rules) for i, row in enumerate(rows) if row.rules is not None]
    _penalise(logits_LV, [entry for entry in ruled if entry[1].params.has_penalties])
    _add_biases(logits_LV, [entry for entry in ruled if len(entry[2].bias_ids)])
    _allow_alone(logits_LV, ruled)
    _ban(logits_LV, ruled)
    if bitmask is not None:
        _mask(logits_LV, bitmask)


def _penalise(logits_LV: Tensor, ruled: Ruled) -> None:
    if not ruled:
        return
    counted = [(index, *rules.token_counts(row.drafts)) for index, row, rules in ruled]
    at_N = _places(logits_LV, ((index, ids) for index, ids, _ in counted))
    lengths = [len(ids) for _, ids, _ in counted]
    penalties = [
        (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
        for p in (row.params for _, row, _ in ruled)
    ]
    repeated = np.repeat(np.array(penalties, dtype=np.float32).T, lengths, axis=1)
    repetition_N, frequency_N, presence_N = _tensor(repeated, logits_LV)
    counts_N = _tensor(np.concatenate([counts for *_, counts in counted]), logits_LV)
    flat_N = logits_LV.view(-1)
    found_N = flat_N.index_select(0, at_N)
    # as Hugging Face and vLLM do: divide positive logits, multiply negative ones
    found_N = torch.where(found_N > 0, found_N / repetition_N, found_N * repetition_N)
    found_N -= frequency_N * counts_N + presence_N * (counts_N > 0)
    flat_N.scatter_(0, at_N, found_N)


def _add_biases(logits_LV: Tensor, ruled: Ruled) -> None:
    if not ruled:
        return
    at_N = _places(logits_LV, ((index, rules.bias_ids) for index, _, rules in ruled))
    biases = np.concatenate([rules.bias_values for *_, rules in ruled])
    logits_LV.view(-1).index_add_(0, at_N, _tensor(biases, logits_LV))


def _allow_alone(logits_LV: Tensor, ruled: Ruled) -> None:
    allowed = [(i, rules.allowed_ids) for i, _, rules in ruled if rules.allowed_ids is not None]
    if not allowed:
        return
    flat_N, at_N = logits_LV.view(-1), _places(logits_LV, allowed)
    kept_N = flat_N.index_select(0, at_N)
    rows = np.array([index for index, _ in allowed])
    logits_LV.index_fill_(0, _tensor(rows, logits_LV), -torch.inf)
    flat_N.scatter_(0, at_N, kept_N)


def _ban(logits_LV: Tensor, ruled: Ruled) -> None:
    banned = [
        (index, ids)
        for index, row, rules in ruled
        for ids in rules.banned_ids(row.position, row.drafts)
    ]
    if banned:
        logits_LV.view(-1).index_fill_(0, _places(logits_LV, banned), -torch.inf)


def _mask(logits_LV: Tensor, bitmask: NDArray[np.uint32]) -> None:
    """Add 0 or -inf by the bits; a lookup byte by byte is faster than unpacking."""
    addends_LB8 = _ADDENDS[bitmask.view(np.uint8)]
    addends_LV = addends_LB8.reshape(len(bitmask), -1)[:, : logits_LV.shape[1]]
    logits_LV += _tensor(addends_LV, logits_LV)


def _places(logits_LV: Tensor, parts: Iterable[tuple[int, Ids]]) -> Tensor:
    """Places in the flat logits of (row, ids) pairs."""
    width = logits_LV.shape[1]
    return _tensor(np.concatenate([ids + index * width for index, ids in parts]), logits_LV)


def _tensor(values: NDArray[np.generic], like: Tensor) -> Tensor:
    made = torch.from_numpy(values)
    # a copy from other memory would wait for the GPU
    return made.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else made


_BYTES = np.arange(256, dtype=np.uint8)[:, np.newaxis]
_ADDENDS = np.where(np.unpackbits(_BYTES, axis=1, bitorder="little"), 0, -np.inf).astype(np.float32)
