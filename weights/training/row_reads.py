"""Counts the table rows that texts read, and keeps a record of them in a model folder."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.transformer import Transformer
from weights.checkpoints.tensor_files import TensorSource, list_file, read_mapped
from weights.checkpoints.tensor_writer import write_tensors
from weights.errors import CheckpointError
from weights.training.loss import batch_output
from weights.training.packing import Passage, packed_batches

ROW_READS_FILE = "row_reads.safetensors"
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


@torch.no_grad()
def count_reads(model: Transformer, passages: Iterable[Passage]) -> RowReads:
    """Run a model over passages and count the rows that it reads; each passage is a document."""
    config = model.config
    assert config.memory is not None
    num_rows, num_documents = config.memory.num_rows, 0
    counts = torch.zeros(len(config.table_names), 2, num_rows, dtype=torch.int64)
    tables = dict(zip(config.table_names, counts, strict=True))
    for batch in packed_batches(passages, _BATCH_TOKENS):
        memory = batch_output(model, batch, torch.float32, with_trace=True).memory
        lengths_S = torch.tensor(batch.starts).diff()
        document_T = torch.arange(len(lengths_S)).repeat_interleave(lengths_S)
        pairs: dict[str, list[Tensor]] = {name: [] for name in tables}
        for layer, trace in memory.items():
            rows_THK = trace.rows_THK.cpu()
            pair_THK = document_T.view(-1, 1, 1) * num_rows + rows_THK
            for name in layer_tables(config, layer):
                pairs[name].append(pair_THK.flatten())
        for name, of_layers in pairs.items():
            distinct, reads = torch.unique(torch.cat(of_layers), return_counts=True)
            rows = distinct % num_rows
            tables[name][0].index_add_(0, rows, reads)
            tables[name][1].index_add_(0, rows, torch.ones_like(rows))
        num_documents += len(lengths_S)
    return RowReads({name: TableReads(*both) for name, both in tables.items()}, num_documents)


def layer_tables(config: ModelConfig, layer: int) -> tuple[str, ...]:
    """Names of the tables that a memory layer reads."""
    names = config.layer_tables(layer)
    return tuple(name for name in (names.values, names.down) if name is not None)


def row_read_sources(reads: RowReads) -> list[TensorSource]:
    """The tensors of a model's record; counts are int32 if all of them fit."""
    metadata = {_NUM_DOCUMENTS: str(reads.num_documents)}
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

    Raises:
        CheckpointError: the file cannot be written.
    """
    file = folder / ROW_READS_FILE
    partial = file.with_suffix(".partial")
    try:
        partial.unlink(missing_ok=True)
        write_tensors(partial, row_read_sources(reads), lambda num_bytes: None)
        partial.rename(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written ({error.strerror})") from None


def read_row_reads(folder: Path, config: ModelConfig) -> RowReads | None:
    """A model's record; None if its folder has none.

    Raises:
        CheckpointError: the record is not valid, or of a model with other tables; the message
            names file and tensor.
    """
    file = folder / ROW_READS_FILE
    if not file.exists():
        return None
    stored = {one.name: one for one in list_file(file)}
    assert config.memory is not None
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
    text = next(iter(stored.values())).metadata.get(_NUM_DOCUMENTS, "")
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
