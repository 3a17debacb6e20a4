"""One model format to another: a GGUF file or a checkpoint folder to a checkpoint folder."""

from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from tqdm import tqdm

from engine.errors import ConfigError
from weights.checkpoints.checkpoint import expected_shapes, open_checkpoint, save_checkpoint
from weights.checkpoints.importers.gguf import ImportedModel, read_gguf
from weights.checkpoints.table_files import (
    OUTPUT_DTYPES,
    asked_layout,
    converted_parts,
    stored_format,
)
from weights.checkpoints.tensor_files import (
    DTYPES,
    StoredTensor,
    TensorSource,
    has_checksum,
    read_mapped,
)
from weights.checkpoints.tokenizer import TOKENIZER_FILES
from weights.errors import CheckpointError


def convert(
    source: Path, target: Path, dtype: str | None = None, table_dtype: str | None = None
) -> None:
    """Write ``source`` (a ``.gguf`` file or a checkpoint folder) as the new folder ``target``.

    ``dtype`` is one of ``OUTPUT_DTYPES``; without it a folder keeps the dtype of each tensor and a
    GGUF file becomes bfloat16. ``table_dtype``, one of ``TABLE_DTYPES``, is that of value tables,
    where it differs. One tensor is in memory at a time, of tables some rows; progress goes to
    stderr.

    Raises:
        CheckpointError: the source is not understood, the target exists, a row that is to be
            rounded is not finite, or a table is not what its checksum is of, where it has one.
        ConfigError: a dtype is none of those, or ``table_dtype`` is for a model without tables, or
            of tables that are of few bits already.
    """
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not one of {', '.join(OUTPUT_DTYPES)}")
    if source.is_dir():
        imported = read_folder(source, dtype, table_dtype)
    elif table_dtype is not None and source.exists():
        raise ConfigError(f"table_dtype: {source} has no tables")
    elif source.suffix == ".gguf":
        imported = read_gguf(source, OUTPUT_DTYPES[dtype or "bfloat16"])
    else:
        raise CheckpointError(f"{source}: neither a checkpoint folder nor a .gguf file")
    _check_whole(source, imported)
    stored_as = str(imported.sources[0].dtype).removeprefix("torch.")
    config = replace(imported.config, dtype=stored_as)
    total = sum(s.dtype.itemsize * torch.Size(s.shape).numel() for s in imported.sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc=target.name) as progress:
        save_checkpoint(target, config, imported.sources, imported.extra_files, progress.update)


def read_folder(
    folder: Path, dtype: str | None = None, table_dtype: str | None = None
) -> ImportedModel:
    """A checkpoint folder's parts, in other dtypes or as they are; raises as ``convert``."""
    config, stored = open_checkpoint(folder)
    tables = config.model.table_names
    if table_dtype is not None and not tables:
        raise ConfigError(f"table_dtype: {folder} has no tables")
    dense = [_dense(tensor, dtype) for name, tensor in stored.items() if name not in tables]
    sources = sorted(dense, key=attrgetter("name"))
    sources += [_table(stored[name], table_dtype or dtype, table_dtype) for name in tables]
    files = {name: folder / name for name in (*TOKENIZER_FILES, "generation_config.json")}
    extra_files = {name: path.read_bytes() for name, path in files.items() if path.exists()}
    return ImportedModel(config, sources, extra_files)


def _dense(stored: StoredTensor, dtype: str | None) -> TensorSource:
    chosen = OUTPUT_DTYPES[dtype] if dtype is not None else DTYPES[stored.dtype]
    return TensorSource(stored.name, stored.shape, chosen, partial(read_mapped, stored))


def _table(stored: StoredTensor, dtype: str | None, asked: str | None) -> TensorSource:
    """A table in ``dtype``; records stay as they are, unless another was ``asked`` for."""
    is_records = stored_format(stored) is not None
    layout = asked_layout(stored, asked if is_records else dtype)
    # the copy gets a checksum of its own, which must not vouch for data that were damaged before
    load = partial(converted_parts, stored, layout, verify=has_checksum(stored))
    return TensorSource(stored.name, layout.shape, layout.dtype, load, layout.metadata)


def _check_whole(path: Path, imported: ImportedModel) -> None:
    expected = expected_shapes(imported.config.model)
    tables = imported.config.model.table_names
    # a table's shape was checked as it was opened, whatever its format
    found = {
        one.name: expected[one.name] if one.name in tables else one.shape
        for one in imported.sources
    }
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            wanted, got = expected.get(name, "nothing"), found.get(name, "nothing")
            raise CheckpointError(f"{path}: tensor {name}: expected {wanted}, found {got}")
