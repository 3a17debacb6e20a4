"""Changes the table of a saved model in its file."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def rewrite_table(
    folder: Path,
    change: Callable[[torch.Tensor], torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Change a model's only table in its file; by default its metadata stay as they are."""
    (file,) = folder.glob("table-*")
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        kept = opened.metadata()
    file.unlink()  # the file may be a hard link
    save_file({name: change(one) for name, one in tensors.items()}, file, metadata or kept)
