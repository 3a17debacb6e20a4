"""The inputs of a step: one packed buffer of words, filled on the host and read on the device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.executors.batch import Batch
from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.kernels.paged_step import most_query_tiles, query_tiles
from engine.executors.cuda.patch_inputs import patch_input_sizes, write_patches
from engine.model.layout import SequencePart, part_of_sequences
from engine.sampling.choice import CHOICE
from engine.sampling.sampler import choices_of

# more updates are sent by ``DeviceBlockTable.send``; more biases are applied after the step
MOST_UPDATES = 512
MOST_BIASES = 1024
# of block-table updates, and of biases
NUM_STEP_COUNTS = 2
# the inputs of sequences, which every micro-batch has
PART_INPUTS = ("query_starts", "context_lengths", "seats", "tiles")
_FP64 = ("choices", "bias_values", "patch_scales")
_CHOICE_FIELDS = len(CHOICE.names or ())
HostInputs = Mapping[str, NDArray[Any]]


def part_input(name: str, number: int) -> str:
    """The name of an input in ``PART_INPUTS`` for a micro-batch, counted from 0."""
    return f"{name}_{number}"


@dataclass(frozen=True)
class InputLayout:
    """Places of the inputs of one shape in the buffer, in words of 8 bytes.

    Attributes, in this order in the buffer:
        counts: number of block-table updates, of biases, and of each micro-batch's tokens without
            padding.
        ids, positions, kv_slots: of each token; see ``Batch``; padding repeats the first token, but
            writes its keys and values to the scrap slot.
        sources: in mixed steps, the token of its micro-batch whose memory rows a token reads:
            itself, or 0 for padding. Decodes do not read it.
        query_starts, context_lengths, seats: of each sequence of a micro-batch; padding repeats
            the first sequence in decodes, and has no tokens in mixed steps. A micro-batch of
            padding alone begins with the step's first token.
        tiles: see ``PagedStep``; like those three inputs, one for each micro-batch.
        logits_at: token of each row of logits.
        row_seats: seat that gets the token of each row of logits; -1 for none.
        choices: fields of CHOICE of each row, as fp64.
        updates: (seat, index, block) of changed entries of the block table.
        bias_places, bias_values: places in the flat logits, and fp64 numbers to add.
        patch_spans, patch_scales, patch_addresses: see ``DevicePatches``; addresses of each layer.
            Only if there are patched layers.
    """

    shape: StepShape
    num_patched_layers: int = 0

    @cached_property
    def places(self) -> Mapping[str, tuple[int, tuple[int, ...]]]:
        """First word and shape by name."""
        shape = self.shape
        tokens, logits = shape.tokens, shape.logits
        sizes: dict[str, tuple[int, ...]] = {
            "counts": (NUM_STEP_COUNTS + shape.micro_batches,),
            "ids": (tokens,),
            "positions": (tokens,),
            "kv_slots": (tokens,),
            "sources": (tokens,),
            **self._part_sizes(),
            "logits_at": (logits,),
            "row_seats": (logits,),
            "choices": (logits, _CHOICE_FIELDS),
            "updates": (MOST_UPDATES, 3),
            "bias_places": (MOST_BIASES,),
            "bias_values": (MOST_BIASES,),
            **patch_input_sizes(self.shape, self.num_patched_layers),
        }
        places, first = {}, 0
        for name, size in sizes.items():
            places[name] = first, size
            # 16 words: kernels may rely on aligned pointers
            first += -(-int(np.prod(size)) // 16) * 16
        return places

    def _part_sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs of each micro-batch."""
        shape, sizes = self.shape, {}
        for number, (first, last) in enumerate(pairwise(shape.edges)):
            sequences = last - first if shape.is_decode else shape.sequences
            tiles = 0 if shape.is_decode else most_query_tiles(last - first, sequences)
            own = (sequences + 1,), (sequences,), (sequences,), (tiles, 2)
            for name, size in zip(PART_INPUTS, own, strict=True):
                sizes[part_input(name, number)] = size
        return sizes

    @cached_property
    def num_words(self) -> int:
        """Words of all inputs."""
        return self._end_of(list(self.places)[-1])

    @cached_property
    def num_words_without_uses(self) -> int:
        """Words before the uses of patches, which no kernel reads if spans are empty."""
        return self._end_of("patch_spans") if "patch_spans" in self.places else self.num_words

    def _end_of(self, name: str) -> int:
        first, size = self.places[name]
        return first + -(-int(np.prod(size)) // 16) * 16

    def views(self, words: Tensor) -> Mapping[str, Tensor]:
        """The inputs as views of a buffer; those in ``_FP64`` are fp64."""
        found = {}
        for name, (first, size) in self.places.items():
            part = words[first : first + int(np.prod(size))]
            found[name] = (part.view(torch.float64) if name in _FP64 else part).view(size)
        return found


class InputWriter:
    """Writes batches of a model with this many query heads per KV head into buffers on the host."""

    def __init__(
        self, vocab_size: int, group: int, scrap_slot: int, patched_layers: Sequence[int] = ()
    ) -> None:
        self._vocab_size, self._group, self._scrap_slot = vocab_size, group, scrap_slot
        self._patched_layers = patched_layers

    def write(
        self,
        out: HostInputs,
        shape: StepShape,
        batch: Batch,
        updates: Sequence[tuple[int, int, int]],
        biases: tuple[NDArray[np.int64], NDArray[np.float64]] | None,
    ) -> None:
        """Write all inputs of a shape, except updates and biases beyond their counts, and uses of
        patches beyond those that spans name."""
        num_biases = 0 if biases is None else len(biases[0])
        out["counts"][:NUM_STEP_COUNTS] = len(updates), num_biases
        _write_padded(out["ids"], batch.ids_T.numpy())
        _write_padded(out["positions"], batch.positions_T.numpy())
        count = len(batch.ids_T)
        out["kv_slots"][:count] = batch.kv_index_T.numpy()
        out["kv_slots"][count:] = self._scrap_slot
        out["sources"][:] = 0
        for number, (first, end) in enumerate(pairwise(shape.edges)):
            last = min(end, count)
            num_tokens = max(0, last - first)
            out["counts"][NUM_STEP_COUNTS + number] = num_tokens
            out["sources"][first : first + num_tokens] = np.arange(num_tokens)
            own = {name: out[part_input(name, number)] for name in PART_INPUTS}
            if shape.is_decode:
                _write_decodes(own, batch, slice(first, end))
            else:
                self._write_sequences(own, batch, first, last)
        self._write_rows(out, batch)
        write_patches(out, shape, batch, self._patched_layers)
        if updates:
            out["updates"][: len(updates)] = updates
        if biases is not None:
            out["bias_places"][:num_biases] = biases[0]
            out["bias_values"][:num_biases] = biases[1]

    def _write_sequences(self, own: HostInputs, batch: Batch, first: int, last: int) -> None:
        """Write the sequences of the tokens ``[first, last)`` of a mixed step."""
        lengths = batch.context_lengths
        if first < last:
            part = part_of_sequences(batch.query_starts, lengths, first, last)
        else:
            # padding alone, whose rows must be defined as well
            later = batch.query_starts[1] - 1
            part = SequencePart(slice(0, 1), (0, 1), (lengths[0] - later,))
        starts = np.array(part.query_starts, dtype=np.int64)
        own["query_starts"][: len(starts)] = starts
        own["query_starts"][len(starts) :] = starts[-1]
        _write_padded(own["context_lengths"], np.array(part.context_lengths, dtype=np.int64))
        _write_padded(own["seats"], np.array(batch.seats[part.own], dtype=np.int64))
        own["tiles"][:] = query_tiles(np.diff(starts).tolist(), self._group, len(own["tiles"]))

    def _write_rows(self, out: HostInputs, batch: Batch) -> None:
        at = batch.logits_at_L.numpy()
        _write_padded(out["logits_at"], at)
        out["row_seats"][:] = -1
        num_rows = len(batch.rows)
        sequences = np.searchsorted(batch.query_starts, at[:num_rows], side="right") - 1
        seats = np.array(batch.seats, dtype=np.int64)[sequences]
        # a sequence with drafts has several rows; the host knows its token before the next step
        counts = np.bincount(sequences, minlength=len(batch.seats))[sequences]
        out["row_seats"][:num_rows] = np.where(counts == 1, seats, -1)
        out["choices"][:] = 0
        if num_rows:
            choices = choices_of(batch.rows, self._vocab_size)
            for column, name in enumerate(choices.dtype.names or ()):
                out["choices"][:num_rows, column] = choices[name]


def _write_padded(out: NDArray[np.generic], values: NDArray[np.generic]) -> None:
    """Write values, then the first of them again and again."""
    out[: len(values)] = values
    out[len(values) :] = values[0] if len(values) else 0


def _write_decodes(own: HostInputs, batch: Batch, part: slice) -> None:
    """Write a range of the sequences of a decode, each of one token."""
    own["query_starts"][:] = np.arange(len(own["query_starts"]))
    for name, values in ("context_lengths", batch.context_lengths), ("seats", batch.seats):
        # padding repeats the first sequence of the step, and each repetition has a separate row
        padded = np.full(part.stop, values[0], dtype=np.int64)
        padded[: len(values)] = values[: part.stop]
        own[name][:] = padded[part]
