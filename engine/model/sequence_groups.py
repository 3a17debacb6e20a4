"""Groups sequences of similar length into rectangles for batched attention."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SequenceGroups(NamedTuple):
    """All sequences of a batch in rectangles that are at most half padding.

    Attributes:
        shapes: per rectangle S sequences and L, the largest number of tokens.
        tokens_C: int64 token index of each cell; padding repeats a sequence's last token.
        is_token_C: False for cells of padding.
        cells_T: int64 cell index of each token.
    """

    shapes: tuple[tuple[int, int], ...]
    tokens_C: Tensor
    is_token_C: Tensor
    cells_T: Tensor

    def spread(self, x_TF: Tensor) -> list[Tensor]:
        """Copy ``[T, F]`` into rectangles ``[S, L, F]``; differentiable."""
        cells_CF: Tensor = _Spread.apply(x_TF, self)  # type: ignore[no-untyped-call]
        sizes = [count * length for count, length in self.shapes]
        parts = torch.split(cells_CF, sizes)
        return [part.view(*shape, -1) for part, shape in zip(parts, self.shapes, strict=True)]

    def gather(self, rectangles: Sequence[Tensor]) -> Tensor:
        """The inverse of ``spread``; differentiable, with no gradient for padding."""
        cells_CF = torch.cat([one.flatten(0, 1) for one in rectangles])
        out_TF: Tensor = _Gather.apply(cells_CF, self)  # type: ignore[no-untyped-call]
        return out_TF


class _Spread(torch.autograd.Function):
    """Both passes are gathers: no two tokens share a cell, and padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x_TF: Tensor, groups: SequenceGroups) -> Tensor:
        ctx.groups = groups
        return x_TF.index_select(0, groups.tokens_C)

    @staticmethod
    def backward(ctx: Any, grad_CF: Tensor) -> tuple[Tensor, None]:
        return grad_CF.index_select(0, ctx.groups.cells_T), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cells_CF: Tensor, groups: SequenceGroups) -> Tensor:
        ctx.groups = groups
        return cells_CF.index_select(0, groups.cells_T)

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, None]:
        groups: SequenceGroups = ctx.groups
        grad_CF = grad_TF.index_select(0, groups.tokens_C)
        return grad_CF.mul_(groups.is_token_C.unsqueeze(1)), None


def group_sequences(starts: Sequence[int], device: torch.device) -> SequenceGroups:
    """Group the non-empty sequences ``[starts[s], starts[s + 1])``."""
    starts_S1 = torch.tensor(starts, dtype=torch.int64)
    lengths_S = starts_S1.diff()
    # of lengths with equally many bits, the longest is less than twice the shortest
    bits = [int(length).bit_length() for length in lengths_S.tolist()]
    empty = torch.empty(0, dtype=torch.int64)
    shapes, tokens, are_tokens = [], [empty], [empty.bool()]
    for number in sorted(set(bits)):
        chosen = torch.tensor([sequence for sequence, of in enumerate(bits) if of == number])
        offsets_1L = torch.arange(int(lengths_S[chosen].max())).unsqueeze(0)
        own_S1 = lengths_S[chosen].unsqueeze(1)
        tokens_SL = starts_S1[chosen].unsqueeze(1) + torch.minimum(offsets_1L, own_S1 - 1)
        shapes.append((len(chosen), offsets_1L.shape[1]))
        tokens.append(tokens_SL.flatten())
        are_tokens.append((offsets_1L < own_S1).flatten())
    tokens_C, is_token_C = torch.cat(tokens), torch.cat(are_tokens)
    cells_T = torch.empty(int(starts_S1[-1]), dtype=torch.int64)
    cells_T[tokens_C[is_token_C]] = is_token_C.nonzero().squeeze(1)
    placed = (one.to(device) for one in (tokens_C, is_token_C, cells_T))
    return SequenceGroups(tuple(shapes), *placed)
