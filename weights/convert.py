"""One model format to another: a GGUF file or a checkpoint folder to a checkpoint folder."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from weights.checkpoint import expected_shapes, open_checkpoint, save_checkpoint, table_names
from weights.errors import CheckpointError
from weights.importers.gguf import ImportedModel, read_gguf
from weights.tensor_files import DTYPES, TensorSource, read_mapped
from weights.tokenizer import TOKENIZER_FILES

OUTPUT_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def convert(source: Path, target: Path, dtype: str | None = None) -> None:
    """Write ``source`` (a ``.gguf`` file or a checkpoint folder) as the new folder ``target``.

    ``dtype`` is one of ``OUTPUT_DTYPES``; without it a folder keeps the dtype of each tensor and a
    GGUF file becomes bfloat16. One tensor is in memory at a time; progress goes to stderr.

    Raises:
        CheckpointError: the source is not understood, or the target exists.
        ValueError: ``dtype`` is none of those.
    """
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(OUTPUT_DTYPES)}")
    if source.is_dir():
        imported = read_folder(source, dtype)
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


def read_folder(folder: Path, dtype: str | None) -> ImportedModel:
    """A checkpoint folder's parts, its tensors in ``dtype`` or as they are (CheckpointError)."""
    config, stored = open_checkpoint(folder)
    tables = set(table_names(config.model).values())
    sources = [
        TensorSource(
            name=name,
            shape=tensor.shape,
            dtype=OUTPUT_DTYPES[dtype] if dtype is not None else DTYPES[tensor.dtype],
            load=partial(read_mapped, tensor),
        )
        for name, tensor in sorted(stored.items(), key=lambda item: (item[0] in tables, item[0]))
    ]
    files = {name: folder / name for name in (*TOKENIZER_FILES, "generation_config.json")}
    extra_files = {name: path.read_bytes() for name, path in files.items() if path.exists()}
    return ImportedModel(config, sources, extra_files)


def _check_whole(path: Path, imported: ImportedModel) -> None:
    expected = expected_shapes(imported.config.model)
    found = {source.name: source.shape for source in imported.sources}
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            wanted, got = expected.get(name, "nothing"), found.get(name, "nothing")
            raise CheckpointError(f"{path}: tensor {name}: expected {wanted}, found {got}")
