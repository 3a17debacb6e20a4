"""The rows of each table that are read most: a file of a model folder that warms row caches."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from engine.model.config import ModelConfig
from weights.checkpoints.tensor_files import list_file, read_mapped
from weights.errors import CheckpointError

HOT_ROWS_FILE = "hot_rows.safetensors"


def hot_rows_content(rows: Mapping[str, Tensor]) -> bytes:
    """The content of the file, from int64 row ids ``[L]`` by table name, most read first."""
    return safetensors.torch.save(dict(rows))


def read_hot_rows(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Row ids by table name, int64 ``[L]``, most read first; empty if the folder has no file.

    Raises:
        CheckpointError: the file cannot be read, names a table that the model lacks, or a row
            outside its table, or more rows than the table has.
    """
    file = folder / HOT_ROWS_FILE
    if not file.exists():
        return {}
    rows = {}
    for stored in list_file(file):
        where = f"{file}: tensor {stored.name:.100}"
        if config.memory is None or stored.name not in config.table_names:
            raise CheckpointError(f"{where}: is no table of this model")
        most = config.memory.num_rows
        if stored.dtype != "I64" or len(stored.shape) != 1 or stored.shape[0] > most:
            found = f"{stored.dtype} {list(stored.shape)}"
            raise CheckpointError(f"{where}: expected at most {most} row ids in I64, got {found}")
        rows[stored.name] = read_mapped(stored)
        check_row_ids(where, rows[stored.name], most)
    return rows


def check_row_ids(where: str, rows: Tensor, num_rows: int) -> None:
    """Raise CheckpointError, which begins with ``where``, for a row id outside a table."""
    outside = (rows < 0) | (rows >= num_rows)
    if outside.any():
        raise CheckpointError(f"{where}: row {int(rows[outside][0])} is outside [0, {num_rows})")
