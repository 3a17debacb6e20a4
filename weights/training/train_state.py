"""What a run goes on from: a checkpoint folder that also holds moments and place."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.model.transformer import Transformer
from memory_ops.tables.trained import TrainedTable
from weights.checkpoints.checkpoint import save_checkpoint
from weights.checkpoints.config_json import CheckpointConfig
from weights.checkpoints.tensor_files import TensorSource, list_file, read_into, read_mapped
from weights.errors import CheckpointError
from weights.training.optimizer import Optimizer
from weights.training.token_stream import StreamPlace
from weights.training.training_data import TextTokens

_MOMENTS, _PLACE = "trainer.safetensors", "trainer.json"
_KEPT = 2


@dataclass(frozen=True)
class TrainState:
    """What changes in a run, and where it is kept.

    Attributes:
        folder: of all its checkpoints.
        model: its weights, float32.
        tables: by their names in a checkpoint.
        optimizer: its moments.
        text: the tokenizer that checkpoints carry.
    """

    folder: Path
    model: Transformer
    tables: Mapping[str, TrainedTable]
    optimizer: Optimizer
    text: TextTokens

    def save(self, step: int, place: StreamPlace) -> Path:
        """Write the state after so many steps, whole or not at all; older ones but one go.

        Raises:
            CheckpointError: it cannot be written; what was written before is left as it was.
        """
        target = self.folder / f"step-{step:08}"
        text = self.text
        config = CheckpointConfig(self.model.config, text.eos_ids, text.bos_id, "float32")
        place_text = json.dumps({"step": step, "place": place._asdict()})
        save_checkpoint(
            target,
            config,
            _sources(self._weights()),
            {**self.text.files, _PLACE: place_text.encode()},
            more_tensors={_MOMENTS: _sources(self._moments())},
        )
        for old in saved_states(self.folder)[:-_KEPT]:
            _remove(old)
        return target

    @torch.no_grad()
    def load(self, saved: Path) -> tuple[int, StreamPlace]:
        """Go back to a saved state; return its step and place.

        Raises:
            CheckpointError: it is not one of this run's.
        """
        try:
            raw = json.loads((saved / _PLACE).read_text(encoding="utf-8"))
            step, place = int(raw["step"]), StreamPlace(**raw["place"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{saved / _PLACE}: {error}") from None
        files = [*saved.glob("model*.safetensors"), *saved.glob("table-*.safetensors")]
        stored = {t.name: t for file in (*files, saved / _MOMENTS) for t in list_file(file)}
        wanted = self._weights() | self._moments()
        if set(wanted) != set(stored):
            name = min(set(wanted) ^ set(stored))
            raise CheckpointError(f"{saved}: tensor {name} is not in both this run and its state")
        for name, tensor in wanted.items():
            if (stored[name].shape, stored[name].dtype) != (tuple(tensor.shape), "F32"):
                found = f"{stored[name].dtype} {list(stored[name].shape)}"
                raise CheckpointError(f"{saved}: tensor {name} is {found}")
            if tensor.is_cpu:
                read_into(stored[name], tensor)
            else:
                tensor.copy_(read_mapped(stored[name]))
        self.optimizer.go_to(step)
        return step, place

    def _weights(self) -> dict[str, Tensor]:
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        return weights | {name: table.table_RV for name, table in self.tables.items()}

    def _moments(self) -> dict[str, Tensor]:
        moments: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            for kind, moment in self.optimizer.moments(parameter).items():
                moments[f"{kind}.{name}"] = moment
        for name, of_table in zip(self.tables, self.optimizer.tables.moments, strict=True):
            for kind, one in zip(("exp_avg", "exp_avg_sq"), of_table, strict=True):
                if one is not None:
                    moments[f"{kind}.{name}"] = one
        return moments


def saved_states(folder: Path) -> list[Path]:
    """Whole states, oldest first; what else lies there is not ours."""
    return sorted(one for one in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", one.name))


def _sources(tensors: Mapping[str, Tensor]) -> list[TensorSource]:
    return [
        TensorSource(name, tuple(tensor.shape), tensor.dtype, tensor.cpu)
        for name, tensor in tensors.items()
    ]


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run had begun to write, or to remove."""
    for left in folder.glob(".step-*"):
        shutil.rmtree(left)


def _remove(folder: Path) -> None:
    # renamed first, so that what is half gone is not taken for a state
    gone = folder.with_name(f".{folder.name}.gone")
    folder.rename(gone)
    shutil.rmtree(gone)
