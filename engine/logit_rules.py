"""What changes the logits before a token is chosen: penalties, biases, bans, masks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling_params import SamplingParams


class SamplingRow(NamedTuple):
    """One token to be chosen.

    Attributes:
        params: how.
        seed: the request's, from which with ``position`` the random number follows.
        position: the place in the sequence that the token will have.
        history: all tokens before it, where ``params.needs_history``.
        prompt_length: how many of them are the prompt.
    """

    params: SamplingParams
    seed: int
    position: int
    history: tuple[int, ...]
    prompt_length: int

    @property
    def num_generated(self) -> int:
        """Tokens generated before this one."""
        return self.position - self.prompt_length

    @property
    def is_early(self) -> bool:
        """Whether the answer must not end yet."""
        return self.num_generated < self.params.min_tokens


def apply_rules(
    logits_LV: Tensor,
    rows: Sequence[SamplingRow],
    eos_ids: frozenset[int],
    bitmask: NDArray[np.uint32] | None,
) -> None:
    """Change ``logits_LV`` (fp32) in place, in the order that ``SamplingParams`` states."""
    _penalise(logits_LV, rows)
    _add_biases(logits_LV, rows)
    _allow_alone(logits_LV, rows)
    _ban(logits_LV, rows, eos_ids)
    if bitmask is not None:
        allowed_LV = unpack_bitmask(bitmask, logits_LV.shape[1])
        logits_LV.masked_fill_(~torch.from_numpy(allowed_LV).to(logits_LV.device), -torch.inf)


def unpack_bitmask(bitmask: NDArray[np.uint32], vocab_size: int) -> NDArray[np.bool_]:
    """``[L, ceil(vocabulary / 32)]`` words as ``[L, vocabulary]`` truth values."""
    bits = np.unpackbits(bitmask.view(np.uint8), axis=-1, count=vocab_size, bitorder="little")
    return bits.astype(np.bool_)


def _penalise(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> None:
    chosen = [index for index, row in enumerate(rows) if row.params.has_penalties]
    if not chosen:
        return
    at = torch.tensor(chosen, device=logits_LV.device)
    wide_PV = logits_LV[at]
    seen_PV, generated_PV = torch.zeros_like(wide_PV), torch.zeros_like(wide_PV)
    for count_PV, skip_prompt in ((seen_PV, False), (generated_PV, True)):
        for index, row in enumerate(chosen):
            first = rows[row].prompt_length if skip_prompt else 0
            ids = torch.tensor(rows[row].history[first:], dtype=torch.int64, device=at.device)
            count_PV[index].index_add_(0, ids, torch.ones_like(ids, dtype=count_PV.dtype))

    def column(name: str) -> Tensor:
        values = [getattr(rows[row].params, name) for row in chosen]
        return torch.tensor(values, dtype=wide_PV.dtype, device=at.device).unsqueeze(1)

    # Hugging Face's and vLLM's: dividing where positive, multiplying where negative
    repetition_P1 = column("repetition_penalty")
    repeated_PV = torch.where(wide_PV > 0, wide_PV / repetition_P1, wide_PV * repetition_P1)
    wide_PV = torch.where(seen_PV > 0, repeated_PV, wide_PV)
    wide_PV -= column("frequency_penalty") * generated_PV
    wide_PV -= column("presence_penalty") * (generated_PV > 0)
    logits_LV[at] = wide_PV


def _add_biases(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = [(i, *pair) for i, row in enumerate(rows) for pair in row.params.logit_bias]
    if entries:
        at, ids, biases = zip(*entries, strict=True)
        places = (torch.tensor(at), torch.tensor(ids))
        values = torch.tensor(biases, dtype=logits_LV.dtype, device=logits_LV.device)
        logits_LV.index_put_(places, values, accumulate=True)


def _allow_alone(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> None:
    for index, row in enumerate(rows):
        if row.params.allowed_token_ids is not None:
            ids = torch.tensor(sorted(row.params.allowed_token_ids), device=logits_LV.device)
            kept = logits_LV[index, ids]
            logits_LV[index] = -torch.inf
            logits_LV[index, ids] = kept


def _ban(logits_LV: Tensor, rows: Sequence[SamplingRow], eos_ids: frozenset[int]) -> None:
    banned: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        for word in row.params.bad_words:
            before = word[:-1]
            if row.history[len(row.history) - len(before) :] == before:
                banned.append((index, word[-1]))
        if row.is_early:
            banned += [(index, token_id) for token_id in row.params.stop_token_ids | eos_ids]
    if banned:
        at, ids = zip(*banned, strict=True)
        logits_LV[torch.tensor(at), torch.tensor(ids)] = -torch.inf
