"""Sequences of about the same length, side by side in rectangles: what batched attention takes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rectangle(NamedTuple):
    """S sequences of up to L tokens.

    Attributes:
        places_SL: int64, where their tokens lie in the ragged batch; after a sequence's end its
            last token again.
        is_token_SL: where there is one.
    """

    places_SL: Tensor
    is_token_SL: Tensor


class SequenceGroups(NamedTuple):
    """All sequences of a batch, no rectangle more than half empty.

    Attributes:
        rectangles: what they were put in.
        order_T: int64; the place of each of the batch's tokens among those of all rectangles.
    """

    rectangles: tuple[Rectangle, ...]
    order_T: Tensor


def group_sequences(starts: Sequence[int], device: torch.device) -> SequenceGroups:
    """Group the sequences ``[starts[s], starts[s + 1])``, none of them empty."""
    starts_S1 = torch.tensor(starts, dtype=torch.int64)
    lengths_S = starts_S1.diff()
    # of those with the same number of bits the longest is less than twice the shortest
    bits = [int(length).bit_length() for length in lengths_S.tolist()]
    rectangles = []
    for number in sorted(set(bits)):
        chosen = torch.tensor([sequence for sequence, of in enumerate(bits) if of == number])
        offsets_1L = torch.arange(int(lengths_S[chosen].max())).unsqueeze(0)
        own_S1 = lengths_S[chosen].unsqueeze(1)
        places_SL = starts_S1[chosen].unsqueeze(1) + torch.minimum(offsets_1L, own_S1 - 1)
        rectangles.append(Rectangle(places_SL.to(device), (offsets_1L < own_S1).to(device)))
    if not rectangles:
        return SequenceGroups((), torch.empty(0, dtype=torch.int64, device=device))
    places_T = torch.cat([one.places_SL[one.is_token_SL] for one in rectangles])
    return SequenceGroups(tuple(rectangles), places_T.argsort())
