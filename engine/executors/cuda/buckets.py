"""Shapes of steps: the buckets that graphs are captured for, and the exact shapes of the others."""

from collections.abc import Iterator
from typing import NamedTuple

DECODE_SEQUENCES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_MIXED_TOKENS = (64, 128, 256, 512)


class StepShape(NamedTuple):
    """Sizes that kernels of a step are launched with; a step is padded to them.

    Attributes:
        tokens: T.
        sequences: S.
        logits: L, positions at which logits are computed.
        is_decode: every sequence has one token and one position of logits, its own.
    """

    tokens: int
    sequences: int
    logits: int
    is_decode: bool


class Buckets:
    """The shapes for which graphs exist: decodes by sequences, and mixed steps by tokens."""

    def __init__(self, max_num_seqs: int, max_batched_tokens: int) -> None:
        within = [count for count in DECODE_SEQUENCES if count < max_num_seqs]
        decodes = [*within, min(max_num_seqs, DECODE_SEQUENCES[-1])]
        self._decodes = [StepShape(count, count, count, True) for count in dict.fromkeys(decodes)]
        self._mixed = [
            StepShape(count, max_num_seqs, max_num_seqs, False)
            for count in _MIXED_TOKENS
            if max_num_seqs <= count <= max_batched_tokens
        ]

    def __iter__(self) -> Iterator[StepShape]:
        """All buckets, the largest first: it decides about the size of the graphs' memory."""
        everything = [*self._decodes, *self._mixed]
        return iter(sorted(everything, key=lambda shape: shape.tokens, reverse=True))

    def holding(self, exact: StepShape) -> Iterator[StepShape]:
        """The buckets that hold a step of this exact shape, the smallest first."""
        for bucket in (*(self._decodes if exact.is_decode else ()), *self._mixed):
            fits = exact.tokens <= bucket.tokens and exact.sequences <= bucket.sequences
            if fits and exact.logits <= bucket.logits:
                yield bucket
