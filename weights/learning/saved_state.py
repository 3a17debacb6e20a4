"""Saves an interrupted learning run in one file, from which it resumes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weights.checkpoints.tensor_files import TensorSource, list_file, read_mapped
from weights.checkpoints.tensor_writer import replace_tensors
from weights.errors import CheckpointError, TrainingError

_RUN, _PROGRESS = "run", "progress"


def state_file(patch: Path) -> Path:
    """The file with the state of an unfinished run, in the parent folder of the patch."""
    return patch.with_name(f"{patch.name}.state.safetensors")


def save_state(
    file: Path, run: Mapping[str, Any], progress: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a state atomically, replacing an older one.

    Args:
        file: see ``state_file``.
        run: settings and hashes that must be the same on resume; JSON.
        progress: progress of the loop; JSON.
        tensors: state of the student; at least one tensor.

    Raises:
        TrainingError: the file cannot be written; an older one is unchanged.
    """
    metadata = {_RUN: json.dumps(run), _PROGRESS: json.dumps(progress)}
    sources = [
        TensorSource(name, tuple(tensor.shape), tensor.dtype, tensor.cpu, metadata)
        for name, tensor in tensors.items()
    ]
    try:
        replace_tensors(file, sources)
    except OSError as error:
        raise TrainingError(f"{file}: cannot be written ({error.strerror})") from None


def load_state(file: Path, run: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The progress and the student's tensors of a state that was saved with an equal ``run``.

    Raises:
        TrainingError: the file is no state, or a setting differs; the message names it.
    """
    try:
        stored = list_file(file)
        metadata = stored[0].metadata
        saved, progress = json.loads(metadata[_RUN]), json.loads(metadata[_PROGRESS])
        tensors = {one.name: read_mapped(one) for one in stored}
    except CheckpointError as error:
        raise TrainingError(str(error)) from None
    except (ValueError, LookupError) as error:
        raise TrainingError(f"{file}: is not the state of a learning run ({error!r})") from None
    if not isinstance(saved, dict) or not isinstance(progress, dict):
        raise TrainingError(f"{file}: is not the state of a learning run")
    now = json.loads(json.dumps(run))
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            raise TrainingError(
                f"{name}: must be {saved.get(name)!r} to resume {file}, not {now.get(name)!r};"
                " delete that file to begin anew"
            )
    return progress, tensors
