"""Converts a GGUF file or a checkpoint folder to a new checkpoint folder."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from tqdm import tqdm

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.weight_bits import HEAD_DTYPE
from weights.checkpoints.checkpoint import (
    expected_tensors,
    open_checkpoint,
    save_checkpoint,
    table_origins,
)
from weights.checkpoints.hot_rows import HOT_ROWS_FILE
from weights.checkpoints.importers.gguf import read_gguf
from weights.checkpoints.importers.gguf_files import files_version, is_gguf
from weights.checkpoints.importers.imported_model import ImportedModel
from weights.checkpoints.importers.lingua import read_lingua
from weights.checkpoints.importers.lingua_files import weights_folder
from weights.checkpoints.importers.sparse_memory import read_sparse_memory
from weights.checkpoints.importers.sparse_memory_files import is_sparse_memory
from weights.checkpoints.stored_groups import (
    dense_sources,
    embedding_dtype,
    requested_formats,
    rounded_sources,
    source_formats,
)
from weights.checkpoints.table_files import (
    OUTPUT_DTYPES,
    ROW_READS_FILE,
    converted_parts,
    requested_layout,
    stored_format,
)
from weights.checkpoints.table_origin import carried_metadata
from weights.checkpoints.tensor_files import (
    STORED_DTYPES,
    StoredTensor,
    TensorSource,
    has_checksum,
    read_mapped,
)
from weights.checkpoints.tokenizer import TOKENIZER_FILES
from weights.errors import CheckpointError
from weights.training.row_reads import read_row_reads, write_row_reads


def convert(
    source: Path,
    target: Path,
    dtype: str | None = None,
    table_dtype: str | None = None,
    weight_dtype: str | None = None,
    embedding_dtype: str | None = None,
    source_version: str | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write a model as the new folder ``target``.

    Holds one tensor in memory at a time, and some rows of a table. Tables keep their origin. Shows
    progress on stderr.

    Args:
        source: a ``.gguf`` file, a checkpoint folder, the folder of a training run of
            facebookresearch/memory, or a folder of sparse-memory-lm.
        target: folder to create.
        dtype: one of ``OUTPUT_DTYPES``, which all weights get, those in groups too; None keeps
            each tensor's dtype (see ``read_gguf``).
        table_dtype: one of ``TABLE_DTYPES`` for value tables; None applies ``dtype`` and keeps
            quantised tables.
        weight_dtype: int8 or int4, to which linear layers are rounded in groups; None rounds none.
        embedding_dtype: the same for embedding and head, by default ``HEAD_DTYPE``; needs
            ``weight_dtype``.
        source_version: ``files_version`` that a GGUF file must have; None takes the present one.
        tokenizer: folder of the tokenizer of a run, which has none; for no other source.

    Raises:
        CheckpointError: the source is invalid or changes meanwhile, the target exists, a row to
            quantise is not finite, or a table fails its checksum.
        ConfigError: a dtype is unknown, or ``table_dtype`` is given for a model without tables or
            with quantised tables, or ``weight_dtype`` for one whose weights are in groups already,
            or ``embedding_dtype`` without ``weight_dtype``, or ``tokenizer`` is missing for a run
            or given for another source.
    """
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not one of {', '.join(OUTPUT_DTYPES)}")
    if embedding_dtype is not None and weight_dtype is None:
        raise ConfigError("embedding_dtype: needs weight_dtype")
    if source_version is None and is_gguf(source) and not source.is_dir():
        source_version = files_version(source)
    imported = _imported(source, dtype, table_dtype, tokenizer)
    _check_shapes(source, imported)
    if weight_dtype is not None:
        imported = _rounded(source, imported, weight_dtype, embedding_dtype or HEAD_DTYPE)
    config, sources = imported.config, imported.sources
    copy_row_reads = _row_reads_copier(source, config.model)

    def finish(made: Path) -> None:
        copy_row_reads(made)
        if source_version is not None and files_version(source) != source_version:
            raise CheckpointError(f"{source}: changed while it was converted; try again")

    total = sum(s.dtype.itemsize * torch.Size(s.shape).numel() for s in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc=target.name) as progress:
        save_checkpoint(
            target, config, sources, imported.extra_files, progress.update, finish=finish
        )


def _imported(
    source: Path, dtype: str | None, table_dtype: str | None, tokenizer: Path | None
) -> ImportedModel:
    if is_sparse_memory(source) or weights_folder(source) is not None:
        return _imported_run(source, dtype, table_dtype, tokenizer)
    if tokenizer is not None:
        raise ConfigError(f"tokenizer: {source} is not a training run's folder")
    if source.is_dir():
        return read_folder(source, dtype, table_dtype)
    if table_dtype is not None and source.exists():
        raise ConfigError(f"table_dtype: {source} has no tables")
    if is_gguf(source):
        return read_gguf(source, None if dtype is None else OUTPUT_DTYPES[dtype])
    raise CheckpointError(f"{source}: is neither a folder nor a .gguf file")


def _imported_run(
    source: Path, dtype: str | None, table_dtype: str | None, tokenizer: Path | None
) -> ImportedModel:
    if tokenizer is None:
        raise ConfigError(f"tokenizer: {source} has none; give the folder of its tokenizer")
    if is_sparse_memory(source):
        return read_sparse_memory(source, tokenizer, dtype, table_dtype)
    table_dtype = table_dtype or dtype
    if table_dtype is not None and table_dtype not in OUTPUT_DTYPES:
        raise ConfigError(
            f"table_dtype: {table_dtype!r} is not one of {', '.join(OUTPUT_DTYPES)};"
            " round the new folder with `memplus quantize`"
        )
    chosen = None if dtype is None else OUTPUT_DTYPES[dtype]
    rows = None if table_dtype is None else OUTPUT_DTYPES[table_dtype]
    return read_lingua(source, tokenizer, chosen, rows)


def read_folder(
    folder: Path, dtype: str | None = None, table_dtype: str | None = None
) -> ImportedModel:
    """A checkpoint folder as sources to write, with dtypes as in ``convert``; raises likewise."""
    config, stored = open_checkpoint(folder)
    tables = config.model.table_names
    if table_dtype is not None and not tables:
        raise ConfigError(f"table_dtype: {folder} has no tables")
    weights = {name: one for name, one in stored.items() if name not in tables}
    sources: list[TensorSource] = []
    if dtype is not None and config.has_groups:
        shapes = {name: tuple(one.shape) for name, one in expected_tensors(config.model).items()}
        sources, weights = dense_sources(weights, shapes, OUTPUT_DTYPES[dtype])
        config = replace(config, has_groups=False)
    sources += [_dense(one, dtype) for one in weights.values()]
    config = replace(config, dtype=embedding_dtype(sources) or config.dtype)
    sources.sort(key=attrgetter("name"))
    sources += [_table(stored[name], table_dtype or dtype, table_dtype) for name in tables]
    names = *TOKENIZER_FILES, "generation_config.json", HOT_ROWS_FILE
    files = {name: folder / name for name in names}
    extra_files = {name: path.read_bytes() for name, path in files.items() if path.exists()}
    return ImportedModel(config, sources, extra_files)


def _rounded(
    path: Path, imported: ImportedModel, weight_dtype: str, embedding_dtype: str
) -> ImportedModel:
    config = imported.config
    if config.has_groups:
        raise ConfigError(
            f"weight_dtype: the weights of {path} have few bits already; give the model that they"
            " were rounded from"
        )
    formats = requested_formats(config.model, weight_dtype, embedding_dtype)
    sources = rounded_sources(imported.sources, formats)
    return replace(imported, config=replace(config, has_groups=True), sources=sources)


def _row_reads_copier(source: Path, config: ModelConfig) -> Callable[[Path], object]:
    """Writes a folder's record of row reads into another folder, if there is one.

    Rows keep their reads in any dtype.
    """
    if (source / ROW_READS_FILE).exists():
        reads = read_row_reads(source, config, table_origins(source))
        if reads is not None:
            return partial(write_row_reads, reads=reads)
    return lambda folder: None


def _dense(stored: StoredTensor, dtype: str | None) -> TensorSource:
    chosen = OUTPUT_DTYPES[dtype] if dtype is not None else STORED_DTYPES[stored.dtype]
    return TensorSource(stored.name, stored.shape, chosen, partial(read_mapped, stored))


def _table(stored: StoredTensor, dtype: str | None, table_dtype: str | None) -> TensorSource:
    """A table in ``dtype``; quantised rows are kept unless ``table_dtype`` is given."""
    is_records = stored_format(stored) is not None
    layout = requested_layout(stored, table_dtype if is_records else dtype)
    # verify first: the new checksum must not cover data that are damaged already
    load = partial(converted_parts, stored, layout, verify=has_checksum(stored))
    metadata = layout.metadata | carried_metadata(stored)
    return TensorSource(stored.name, layout.shape, layout.dtype, load, metadata)


def _check_shapes(path: Path, imported: ImportedModel) -> None:
    tensors = expected_tensors(imported.config.model, source_formats(imported.sources))
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    tables = imported.config.model.table_names
    # those who opened the source have checked the shapes of records, which depend on their format
    found = {
        one.name: expected[one.name]
        if one.name in tables and one.dtype is torch.uint8
        else one.shape
        for one in imported.sources
    }
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            wanted, got = expected.get(name, "nothing"), found.get(name, "nothing")
            raise CheckpointError(f"{path}: tensor {name}: expected {wanted}, found {got}")
