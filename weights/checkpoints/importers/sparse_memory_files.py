"""Recognises a folder of sparse-memory-lm by its files. Needs no torch."""

from pathlib import Path

META, REST, MODEL = "meta.json", "rest.pt", "model.pt"
HOT_ROWS = "hot_rows.npy"


def is_published(folder: Path) -> bool:
    """Whether a folder has a published model: weights and table in separate files."""
    return (folder / REST).exists()


def is_sparse_memory(folder: Path) -> bool:
    """Whether a folder has a published model or a training checkpoint.

    A folder with ``config.json`` has neither.
    """
    if (folder / "config.json").exists():
        return False
    return is_published(folder) or (folder / MODEL).exists()
