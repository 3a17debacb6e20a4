"""Writes folders of torch.distributed.checkpoint with tensors in several shards."""

import io
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import filesystem, metadata


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], num_files: int = 2) -> Path:
    """Divide tensors along the first dimension, a shard a file, as ranks do.

    The classes and the files are torch's own.
    """
    folder.mkdir(parents=True)
    entries, places = {}, {}
    files = [io.BytesIO() for _ in range(num_files)]
    for name, tensor in tensors.items():
        # ranks beyond the last row have empty shards
        parts = [*tensor.chunk(num_files)] if tensor.ndim else [tensor]
        if tensor.ndim:
            parts += [tensor[:0]] * (num_files - len(parts))
        chunks, row = [], 0
        for file, shard in zip(files, parts, strict=False):
            offsets = torch.Size((row, *[0] * (tensor.ndim - 1)) if tensor.ndim else ())
            chunks.append(metadata.ChunkStorageMetadata(offsets, shard.shape))
            start = file.tell()
            torch.save(shard.clone(), file)
            place = metadata.MetadataIndex(name, offsets, len(chunks) - 1)
            name_of_file = f"__{files.index(file)}_0.distcp"
            places[place] = filesystem._StorageInfo(name_of_file, start, file.tell() - start)
            row += len(shard) if shard.ndim else 1
        properties = metadata.TensorProperties.create_from_tensor(tensor)
        entries[name] = metadata.TensorStorageMetadata(properties, tensor.shape, chunks)
    for rank, file in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    listed = metadata.Metadata(entries, planner_data=None, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(listed))
    return folder
