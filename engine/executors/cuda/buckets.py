"""Shapes of steps: the buckets that graphs are captured for, and the exact shapes of the others."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from engine.executors.batch import Batch

_DECODE_SEQUENCES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_MIXED_TOKENS = (64, 128, 256, 512)
# decode attention: programs for each processor, and the most parts of a context
_PROGRAMS_PER_PROCESSOR = 2
_MOST_SPLITS = 32
# a context with at most this many numbers in a KV head's keys is not split: one program takes no
# longer than several and the kernel that combines their results; not timed on a GPU
_SHORT_CONTEXT = 2**16
# a mixed step may hold few sequences with long contexts
_MIXED_SPLITS = 4
# words of 8 bytes: kernels are compiled for pointers at multiples of 16 bytes
_ALIGNED_WORDS = 2


class StepShape(NamedTuple):
    """Sizes that kernels of a step are launched with; a step is padded to them.

    Attributes:
        tokens: T.
        sequences: S.
        logits: L, positions at which logits are computed.
        is_decode: every sequence has one token and one position of logits, its own.
        num_splits: parts of a context that attention computes side by side, for sequences of few
            tokens. Kernels are compiled for each number, so only buckets of decodes choose it.
        micro_batches: how many parts the step runs in, each with a range of the tokens.
    """

    tokens: int
    sequences: int
    logits: int
    is_decode: bool
    num_splits: int = _MIXED_SPLITS
    micro_batches: int = 1

    @property
    def edges(self) -> tuple[int, ...]:
        """Offsets of the micro-batches in the tokens, padding included, and the end."""
        count = self.micro_batches
        inner = (self.tokens * number // count for number in range(1, count))
        return (0, *(edge // _ALIGNED_WORDS * _ALIGNED_WORDS for edge in inner), self.tokens)

    def is_filled(self, num_tokens: int) -> bool:
        """Whether this many tokens fill at least half of the last micro-batch."""
        *_, first, last = self.edges
        return 2 * num_tokens >= first + last


@dataclass(frozen=True)
class Splits:
    """Chooses ``num_splits`` of decodes, so that few long contexts occupy all processors.

    Attributes:
        num_kv_heads, head_dim: shapes of the model's attention.
        num_processors: see ``Device``.
    """

    num_kv_heads: int
    head_dim: int
    num_processors: int

    def is_short(self, longest_context: int) -> bool:
        """Whether splitting a context of this length gains nothing."""
        return longest_context * self.head_dim <= _SHORT_CONTEXT

    def of_long(self, sequences: int) -> int:
        """The number for contexts that are not short."""
        programs = sequences * self.num_kv_heads
        return max(1, min(_PROGRAMS_PER_PROCESSOR * self.num_processors // programs, _MOST_SPLITS))


class Buckets:
    """The shapes for which graphs exist: decodes by sequences, and mixed steps by tokens."""

    def __init__(self, max_num_seqs: int, max_batched_tokens: int, splits: Splits) -> None:
        self._splits = splits
        within = [count for count in _DECODE_SEQUENCES if count < max_num_seqs]
        counts = dict.fromkeys([*within, min(max_num_seqs, _DECODE_SEQUENCES[-1])])
        self._decodes = [
            StepShape(count, count, count, True, num_splits)
            for count in counts
            for num_splits in sorted({1, splits.of_long(count)})
        ]
        self._mixed = [
            StepShape(count, max_num_seqs, max_num_seqs, False)
            for count in _MIXED_TOKENS
            if max_num_seqs <= count <= max_batched_tokens
        ]

    def __iter__(self) -> Iterator[StepShape]:
        """All buckets, the largest first: it decides about the size of the graphs' memory."""
        everything = [*self._decodes, *self._mixed]
        return iter(sorted(everything, key=lambda shape: shape.tokens, reverse=True))

    def exact(self, batch: Batch) -> StepShape:
        """The shape of a batch without padding."""
        tokens, sequences, logits = len(batch.ids_T), len(batch.seats), len(batch.logits_at_L)
        is_decode = tokens == sequences == len(batch.rows) == logits
        shape = StepShape(tokens, sequences, logits, is_decode)
        if not is_decode:
            return shape
        bucket = next((one for one in self._decodes if one.sequences >= sequences), None)
        is_short = self._splits.is_short(max(batch.context_lengths))
        # more sequences than a bucket holds occupy the processors without splits
        num_splits = 1 if is_short or bucket is None else self._splits.of_long(bucket.sequences)
        return shape._replace(num_splits=num_splits)

    def holding(self, exact: StepShape) -> Iterator[StepShape]:
        """The buckets that hold a step of this exact shape, the smallest first."""
        for bucket in self._decodes if exact.is_decode else ():
            fits = exact.sequences <= bucket.sequences
            if fits and exact.num_splits == bucket.num_splits:
                yield bucket
        for bucket in self._mixed:
            fits = exact.tokens <= bucket.tokens and exact.sequences <= bucket.sequences
            if fits and exact.logits <= bucket.logits:
                yield bucket
