"""Counts the table rows that texts read, and keeps a record of them in a model folder."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.forward_trace import MemoryTrace
from engine.model.transformer import Transformer
from weights.checkpoints.checkpoint import table_origins
from weights.checkpoints.table_files import ROW_READS_FILE
from weights.checkpoints.table_origin import ORIGIN
from weights.checkpoints.tensor_files import TensorSource, list_file, read_mapped
from weights.checkpoints.tensor_writer import replace_tensors
from weights.errors import CheckpointError
from weights.training.loss import batch_output
from weights.training.packing import Passage, cut, packed_batches
from weights.training.token_file import TokenFile

# tokens of a record: part of those that a run trained on, within these limits. A token of a record
# needs no backward pass.
_LEAST_TOKENS, _MOST_TOKENS, _PART_OF_TRAINED = 2**12, 2**18, 4
_READS, _DOCUMENTS = ".reads", ".documents"
_NUM_DOCUMENTS = "documents"
_BATCH_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class TableReads:
    """Reads of one table, over all its layers.

    Attributes:
        reads_R: int64, reads of each row.
        documents_R: int64, documents that read each row at least once.
    """

    reads_R: Tensor
    documents_R: Tensor


@dataclass(frozen=True, eq=False)
class RowReads:
    """Reads of all tables of a model by a number of documents.

    Attributes:
        tables: reads by table name.
        num_documents: documents that were read.
    """

    tables: Mapping[str, TableReads] = field(default_factory=dict)
    num_documents: int = 0


class ReadCounter:
    """Counts the rows that documents read, over all layers that share a table."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.memory is not None
        self._config, self._num_rows = config, config.memory.num_rows
        self._num_documents = 0
        self._counts = {
            name: torch.zeros(2, self._num_rows, dtype=torch.int64) for name in config.table_names
        }

    @property
    def reads(self) -> RowReads:
        """The reads so far."""
        tables = {name: TableReads(*counts) for name, counts in self._counts.items()}
        return RowReads(tables, self._num_documents)

    def add(self, memory: Mapping[int, MemoryTrace], starts: Sequence[int]) -> None:
        """Count the traces of concatenated documents, which begin at ``starts``."""
        lengths_S = torch.tensor(starts).diff()
        document_T11 = torch.arange(len(lengths_S)).repeat_interleave(lengths_S)[:, None, None]
        pairs: dict[str, list[Tensor]] = {name: [] for name in self._counts}
        for layer, trace in memory.items():
            names = self._config.layer_tables(layer)
            for name in filter(None, (names.values, names.down)):
                pairs[name].append(document_T11 * self._num_rows + trace.rows_THK.cpu())
        for name, of_layers in pairs.items():
            every = torch.cat([pair_THK.flatten() for pair_THK in of_layers])
            distinct, reads = torch.unique(every, return_counts=True)
            rows = distinct % self._num_rows
            self._counts[name][0].index_add_(0, rows, reads)
            self._counts[name][1].index_add_(0, rows, torch.ones_like(rows))
        self._num_documents += len(lengths_S)


@torch.no_grad()
def count_reads(
    model: Transformer, passages: Iterable[Passage], dtype: torch.dtype = torch.float32
) -> RowReads:
    """Run a model over passages and count the rows that it reads; each passage is a document."""
    counter = ReadCounter(model.config)
    for batch in packed_batches(passages, _BATCH_TOKENS):
        output = batch_output(model, batch, dtype, with_logits=False, with_trace=True)
        counter.add(output.memory, batch.starts)
    return counter.reads


def recorded_tokens(trained_tokens: int) -> int:
    """Tokens of the record of a run that trained on ``trained_tokens``, at most."""
    return min(max(trained_tokens // _PART_OF_TRAINED, _LEAST_TOKENS), _MOST_TOKENS)


def sampled_passages(
    tokens: TokenFile, sequence_length: int, seed: int, most_tokens: int
) -> Iterator[Passage]:
    """Random documents, cut as in training, of at most ``most_tokens`` tokens in all."""
    num_tokens = 0
    for document in np.random.default_rng(seed).permutation(len(tokens)):
        ids = tokens.ids[tokens.starts[document] : tokens.starts[document + 1]].tolist()
        for passage in cut(ids, sequence_length):
            num_tokens += len(passage)
            if num_tokens > most_tokens:
                return
            yield passage


def _sources(reads: RowReads, origins: Mapping[str, str]) -> list[TensorSource]:
    """The tensors of a model's record; counts are int32 if all of them fit."""
    metadata = {_NUM_DOCUMENTS: str(reads.num_documents)}
    metadata |= {_origin_key(name): origins[name] for name in reads.tables}
    sources = []
    for name, table in reads.tables.items():
        for kind, counts_R in ((_READS, table.reads_R), (_DOCUMENTS, table.documents_R)):
            is_small = int(counts_R.max()) < 2**31
            dtype = torch.int32 if is_small else torch.int64
            sources.append(
                TensorSource(name + kind, tuple(counts_R.shape), dtype, counts_R.cpu, metadata)
            )
    return sources


def write_row_reads(folder: Path, reads: RowReads) -> None:
    """Write a model's record into its folder, replacing an older one atomically.

    The record names the origins of the folder's tables.

    Raises:
        CheckpointError: the file cannot be written.
    """
    file = folder / ROW_READS_FILE
    try:
        replace_tensors(file, _sources(reads, table_origins(folder)))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written ({error.strerror})") from None


def read_row_reads(
    folder: Path, config: ModelConfig, origins: Mapping[str, str]
) -> RowReads | None:
    """A model's record; None if its folder has none.

    Args:
        folder: the checkpoint folder.
        config: the model.
        origins: the origin of each of its tables, which the record must name.

    Raises:
        CheckpointError: the record is not valid, or of a model with other tables; the message
            names file and tensor, and both origins.
    """
    file = folder / ROW_READS_FILE
    if not file.exists():
        return None
    if config.memory is None:
        raise CheckpointError(f"{file}: the model has no tables; delete the file")
    stored = {one.name: one for one in list_file(file)}
    wanted = {name + kind for name in config.table_names for kind in (_READS, _DOCUMENTS)}
    for name in sorted(wanted.symmetric_difference(stored)):
        problem = "is missing" if name in wanted else "is unknown to this model"
        raise CheckpointError(f"{file}: tensor {name} {problem}")
    counts = {}
    for name, one in stored.items():
        if one.dtype not in ("I32", "I64") or one.shape != (config.memory.num_rows,):
            found = f"{one.dtype} {list(one.shape)}"
            expected = f"I32 or I64 [{config.memory.num_rows}]"
            raise CheckpointError(f"{file}: tensor {name}: expected {expected}, got {found}")
        counts[name] = read_mapped(one).long()
        if int(counts[name].min()) < 0:
            raise CheckpointError(f"{file}: tensor {name}: has a count below 0")
    metadata = next(iter(stored.values())).metadata
    for name in config.table_names:
        found = metadata.get(_origin_key(name), "none")
        if found != origins[name]:
            raise CheckpointError(
                f"{file}: metadata {_origin_key(name)}: is {found[:80]}, but the table has"
                f" {origins[name]}; record the reads of this model with `memplus bench trace"
                " --record`, or delete the file"
            )
    text = metadata.get(_NUM_DOCUMENTS, "")
    if not text.isdecimal() or not 0 < len(text) <= 18:
        raise CheckpointError(f"{file}: metadata {_NUM_DOCUMENTS}: expected a count, got {text!r}")
    num_documents = int(text)
    for name in config.table_names:
        if int(counts[name + _DOCUMENTS].max()) > num_documents:
            raise CheckpointError(
                f"{file}: tensor {name + _DOCUMENTS}: has a count above {num_documents}, the"
                " number of documents"
            )
    tables = {
        name: TableReads(counts[name + _READS], counts[name + _DOCUMENTS])
        for name in config.table_names
    }
    return RowReads(tables, num_documents)


def _origin_key(table: str) -> str:
    return f"{ORIGIN}:{table}"
