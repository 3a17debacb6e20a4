"""Training checkpoints: a checkpoint folder with moments and data position, to resume from."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from engine.model.transformer import Transformer
from memory_ops.tables.trained import TrainedTable
from weights.checkpoints.checkpoint import save_checkpoint
from weights.checkpoints.config_json import CheckpointConfig
from weights.checkpoints.tensor_files import DTYPES, list_file
from weights.checkpoints.tensor_part import TensorPart, part_of_table, read_part
from weights.errors import CheckpointError
from weights.models.folder_lock import remove_unheld
from weights.training.optimizer import Optimizer
from weights.training.replicas import Replicas
from weights.training.row_reads import RowReads, write_row_reads
from weights.training.run_folder import saved_states
from weights.training.shared_save import SharedSave
from weights.training.table_usage import TableUsage
from weights.training.token_stream import StreamPosition
from weights.training.training_data import TextTokens

_MOMENTS_FILE, _PROGRESS_FILE = "trainer.safetensors", "trainer.json"
_USAGE_FILE = "trainer-usage.safetensors"
# older ones are removed
MAX_STATES = 2


@dataclass(frozen=True)
class TrainState:
    """The state of a run, saved to and loaded from checkpoint folders.

    Attributes:
        folder: folder of all checkpoints of the run.
        model: float32 model.
        tables: value tables by their names in a checkpoint.
        optimizer: optimiser, whose moments are saved.
        text: tokenizer that is saved with the model.
        usage: reads of each table since the last evaluation, by the tables' names.
        replicas: the processes of the run.
    """

    folder: Path
    model: Transformer
    tables: Mapping[str, TrainedTable]
    optimizer: Optimizer
    text: TextTokens
    usage: Mapping[str, TableUsage] = field(default_factory=dict)
    replicas: Replicas = field(default_factory=Replicas)

    def save(self, step: int, position: StreamPosition, row_reads: RowReads | None = None) -> Path:
        """Write the state after ``step`` steps, atomically; keep only the two newest states.

        All processes call this. The first one writes the folder; others write only their parts of
        tables, into its files. An older state that a server holds stays until it is released.

        ``row_reads`` is the model's record of row reads, if it is to have one.

        Raises:
            CheckpointError: the state cannot be written; older states are unchanged.
        """
        target = self.folder / f"step-{step:08}"
        for table in self.tables.values():
            table.synchronize()
        files = {
            "": self._weights(),
            _MOMENTS_FILE: self._moments(),
            _USAGE_FILE: self._usage(),
        }
        shared = SharedSave(self.folder, files, self.replicas)
        if self.replicas.is_first:
            with shared.leading():
                self._write(target, step, position, shared, row_reads)
        else:
            shared.follow(target)
        return target

    def _write(
        self,
        target: Path,
        step: int,
        position: StreamPosition,
        shared: SharedSave,
        row_reads: RowReads | None,
    ) -> None:
        text = self.text
        config = CheckpointConfig(self.model.config, text.eos_ids, text.bos_id, "float32")
        progress = json.dumps({"step": step, "place": position._asdict()})
        record = {} if row_reads is None else {"finish": partial(write_row_reads, reads=row_reads)}
        save_checkpoint(
            target,
            config,
            shared.sources(""),
            {**self.text.files, _PROGRESS_FILE: progress.encode()},
            more_tensors={name: shared.sources(name) for name in (_MOMENTS_FILE, _USAGE_FILE)},
            **record,
        )
        for old in saved_states(self.folder)[:-MAX_STATES]:
            with contextlib.suppress(OSError):  # the next save tries again
                remove_unheld(old)

    @torch.no_grad()
    def load(self, saved: Path) -> tuple[int, StreamPosition]:
        """Restore a saved state; return its step and data position.

        Raises:
            CheckpointError: the state cannot be read, or does not match the model of this run.
        """
        try:
            raw = json.loads((saved / _PROGRESS_FILE).read_text(encoding="utf-8"))
            step, position = int(raw["step"]), StreamPosition(**raw["place"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{saved / _PROGRESS_FILE}: {error}") from None
        files = [*saved.glob("model*.safetensors"), *saved.glob("table-*.safetensors")]
        stored = {t.name: t for file in (*files, saved / _MOMENTS_FILE) for t in list_file(file)}
        wanted = self._weights() | self._moments()
        if set(wanted) != set(stored):
            name = min(set(wanted) ^ set(stored))
            raise CheckpointError(f"{saved}: tensor {name} is only in one of the state and the run")
        for name, part in wanted.items():
            one, dtype = stored[name], part.tensor.dtype
            if one.shape != part.shape or DTYPES.get(one.dtype) is not dtype:
                found = f"{one.dtype} {list(one.shape)}"
                wanted_kind = f"{dtype} {list(part.shape)}"
                raise CheckpointError(f"{saved}: tensor {name} is {found}, not {wanted_kind}")
            read_part(one, part)
        if self.usage and (saved / _USAGE_FILE).exists():  # not in those of earlier versions
            usage = self._usage()
            for counts in list_file(saved / _USAGE_FILE):
                if counts.name in usage:
                    read_part(counts, usage[counts.name])
        self.optimizer.set_step(step)
        return step, position

    def _weights(self) -> dict[str, TensorPart]:
        weights = {name: TensorPart(p.detach()) for name, p in self.model.named_parameters()}
        return weights | {
            name: part_of_table(table.table_RV, table.shard) for name, table in self.tables.items()
        }

    def _moments(self) -> dict[str, TensorPart]:
        moments: dict[str, TensorPart] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            for kind, moment in self.optimizer.moments(parameter).items():
                moments[f"{kind}.{name}"] = TensorPart(moment)
        for name, of_table in zip(self.tables, self.optimizer.tables.moments, strict=True):
            for kind, one in zip(("exp_avg", "exp_avg_sq"), of_table, strict=True):
                if one is not None:
                    moments[f"{kind}.{name}"] = part_of_table(one, self.tables[name].shard)
        return moments

    def _usage(self) -> dict[str, TensorPart]:
        return {
            name: part_of_table(one.counts_R, self.tables[name].shard)
            for name, one in self.usage.items()
        }
