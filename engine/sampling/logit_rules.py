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

# rows whose addends stay in a CPU's second-level cache
_MASKED_AT_ONCE = 4
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
        apply_mask(logits_LV, bitmask)


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


def masked(logits_LV: Tensor, bitmask: NDArray[np.uint32]) -> Tensor:
    """A copy whose tokens without a bit are -inf."""
    logits_LV = logits_LV.clone()
    apply_mask(logits_LV, bitmask)
    return logits_LV


def apply_mask(logits_LV: Tensor, bitmask: NDArray[np.uint32]) -> None:
    """Add 0 or -inf by the bits, in place.

    A lookup byte by byte is faster than unpacking, and ``take`` is ten times as fast as an index.
    """
    addends_B8 = _ADDENDS[logits_LV.dtype]
    bytes_LB, vocab_size = bitmask.view(np.uint8), logits_LV.shape[1]
    step = len(bitmask) if logits_LV.is_cuda else _MASKED_AT_ONCE
    for start in range(0, len(bitmask), step):
        taken_LB8 = addends_B8.take(bytes_LB[start : start + step], axis=0, mode="clip")
        addends_LV = taken_LB8.reshape(len(taken_LB8), -1)[:, :vocab_size]
        logits_LV[start : start + step] += _tensor(addends_LV, logits_LV).view(logits_LV.dtype)


def _places(logits_LV: Tensor, parts: Iterable[tuple[int, Ids]]) -> Tensor:
    """Places in the flat logits of (row, ids) pairs."""
    width = logits_LV.shape[1]
    return _tensor(np.concatenate([ids + index * width for index, ids in parts]), logits_LV)


def _tensor(values: NDArray[np.generic], like: Tensor) -> Tensor:
    made = torch.from_numpy(values)
    # a copy from other memory would wait for the GPU
    return made.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else made


def _addends(dtype: torch.dtype, stored: torch.dtype) -> NDArray[np.generic]:
    """By byte, the addends of its 8 tokens, as integers of the same size: numpy has no bfloat16."""
    bits_B8 = np.unpackbits(
        np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder="little"
    )
    addends_B8 = torch.zeros(256, 8).masked_fill_(torch.from_numpy(bits_B8) == 0, -torch.inf)
    stored_B8: NDArray[np.generic] = addends_B8.to(dtype).view(stored).numpy()
    return stored_B8


_ADDENDS = {
    torch.float64: _addends(torch.float64, torch.int64),
    torch.float32: _addends(torch.float32, torch.int32),
    torch.bfloat16: _addends(torch.bfloat16, torch.int16),
    torch.float16: _addends(torch.float16, torch.int16),
}
