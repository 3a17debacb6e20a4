"""The inputs of a step: one packed buffer of words, filled on the host and read on the device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.executors.batch import Batch
from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.kernels.paged_step import most_query_tiles, query_tiles
from engine.executors.cuda.patch_inputs import patch_input_sizes, write_patches
from engine.sampling.choice import CHOICE
from engine.sampling.sampler import choices_of

# more updates are sent by ``DeviceBlockTable.send``; more biases are applied after the step
MOST_UPDATES = 512
MOST_BIASES = 1024
_FP64 = ("choices", "bias_values", "patch_scales")
_CHOICE_FIELDS = len(CHOICE.names or ())
HostInputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class InputLayout:
    """Places of the inputs of one shape in the buffer, in words of 8 bytes.

    Attributes, in this order in the buffer:
        counts: number of block-table updates, of biases, and of tokens without padding.
        ids, positions, kv_slots: of each token; see ``Batch``; padding repeats the first token, but
            writes its keys and values to the scrap slot.
        sources: the token whose memory rows a token reads: itself, or 0 for padding.
        query_starts, context_lengths, seats: of each sequence; padding repeats the first sequence
            in decodes, and has no tokens in mixed steps.
        tiles: see ``PagedStep``.
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
        tokens, sequences, logits, is_decode, _ = self.shape
        tiles = 0 if is_decode else most_query_tiles(tokens, sequences)
        sizes: dict[str, tuple[int, ...]] = {
            "counts": (3,),
            "ids": (tokens,),
            "positions": (tokens,),
            "kv_slots": (tokens,),
            "sources": (tokens,),
            "query_starts": (sequences + 1,),
            "context_lengths": (sequences,),
            "seats": (sequences,),
            "tiles": (tiles, 2),
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
        out["counts"][:] = len(updates), num_biases, len(batch.ids_T)
        _write_padded(out["ids"], batch.ids_T.numpy())
        _write_padded(out["positions"], batch.positions_T.numpy())
        count = len(batch.ids_T)
        out["kv_slots"][:count] = batch.kv_index_T.numpy()
        out["kv_slots"][count:] = self._scrap_slot
        out["sources"][:count] = np.arange(count)
        out["sources"][count:] = 0
        self._write_sequences(out, shape, batch)
        self._write_rows(out, batch)
        write_patches(out, shape, batch, self._patched_layers)
        if updates:
            out["updates"][: len(updates)] = updates
        if biases is not None:
            out["bias_places"][:num_biases] = biases[0]
            out["bias_values"][:num_biases] = biases[1]

    def _write_sequences(self, out: HostInputs, shape: StepShape, batch: Batch) -> None:
        starts = np.array(batch.query_starts, dtype=np.int64)
        _write_padded(out["context_lengths"], np.array(batch.context_lengths, dtype=np.int64))
        _write_padded(out["seats"], np.array(batch.seats, dtype=np.int64))
        if shape.is_decode:
            # padding repeats the first sequence, and each repetition has a separate row
            out["query_starts"][:] = np.arange(shape.sequences + 1)
            return
        out["query_starts"][: len(starts)] = starts
        out["query_starts"][len(starts) :] = starts[-1]
        out["tiles"][:] = query_tiles(np.diff(starts).tolist(), self._group, len(out["tiles"]))

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
