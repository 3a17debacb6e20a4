"""Writes the memory adapter of a run that trained only added memory layers."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from weights.adapters.memory_adapter import check_adds_memories, write_adapter
from weights.checkpoints.new_folder import partial_path
from weights.training.train_config import RunConfig


@dataclass(frozen=True)
class TrainedAdapter:
    """The folder of the adapter, and its base."""

    folder: Path
    base: Path

    def write(self, state: Path) -> None:
        """Write the memories of a saved state; the folder is whole or, for a moment, missing.

        Raises:
            CheckpointError, ConfigError: as ``write_adapter``; an earlier adapter is unchanged.
        """
        new, old = partial_path(self.folder), partial_path(self.folder)
        write_adapter(state, self.base, new)
        if self.folder.exists():
            self.folder.rename(old)
        new.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)


def trained_adapter(shape: ModelConfig, run: RunConfig, folder: Path) -> TrainedAdapter | None:
    """The adapter that a run in ``folder`` will write; None if its model has no such form.

    Raises:
        CheckpointError: the base cannot be read.
    """
    if not run.freeze or not run.init_from:
        return None
    base = Path(run.init_from)
    try:
        check_adds_memories(shape, base)
    except ConfigError:
        return None  # the run changes its base in another way, too
    return TrainedAdapter(folder / "adapter", base)
