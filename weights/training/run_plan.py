"""Plan of a training run: checks settings and texts, and states the memory and disk it needs."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import ConfigError
from engine.model.config import ModelConfig
from weights.available_memory import AvailableMemory, available_memory, memory_if_known
from weights.checkpoints.config_json import read_config
from weights.training.data_source import is_current_data
from weights.training.new_model import check_table_tier, model_config, planned_model
from weights.training.optimizer import warmup_steps
from weights.training.replicas import Replicas
from weights.training.run_folder import (
    CHECKPOINTS,
    DATA,
    check_resume,
    newest_state,
    saved_states,
    step_of,
)
from weights.training.run_record import SavedSettings, resumed_settings
from weights.training.train_config import RunConfig, TrainConfig
from weights.training.train_state import MAX_STATES
from weights.training.training_data import TRAINED_TOKENIZER, given_text
from weights.training.training_memory import TrainingMemory, training_memory
from weights.training.training_texts import TrainingTexts


@dataclass(frozen=True)
class RunPlan:
    """The checked plan of a run.

    Attributes:
        shape: config of the model.
        memory: the memory of one process.
        schedule_steps: the steps that the learning rates' schedule spans.
        resumed: the checkpoint to resume from; None for a new run.
        texts: the texts of a new run; None for a resumed one, which has its tokens.
        lines: the plan in words.
    """

    shape: ModelConfig
    memory: TrainingMemory
    schedule_steps: int
    resumed: Path | None
    texts: TrainingTexts | None
    lines: tuple[str, ...]


def plan_run(
    config: TrainConfig,
    folder: Path | None,
    *,
    resume: bool,
    replicas: Replicas | None = None,
    reads_texts: bool = True,
    checks_disk: bool = True,
) -> RunPlan:
    """Check everything that can be checked before a run; writes nothing.

    A plan without ``folder`` is that of a new run; it does not check a disk. Without
    ``reads_texts`` the texts are not read: another process of the run does it. Without
    ``checks_disk`` the disk is not checked: the run is ended before its first checkpoint.

    Raises:
        ConfigError: a setting is invalid, or memory or disk are too small; the message names it.
        DataError: a text cannot be read, or the texts do not allow ``data.vocab_size``.
        CheckpointError: a model, tokenizer or checkpoint cannot be read.
        TrainingError: ``resume`` does not fit the folder, or a setting differs from that of the
            run to resume.
    """
    replicas = replicas or Replicas()
    if folder is not None:
        check_resume(folder, resume=resume)
    resumed = newest_state(folder) if folder is not None else None
    lines: list[str] = []
    texts, given, saved = None, None, SavedSettings(config.run.steps, ())
    if folder is not None and resumed is not None:
        saved = resumed_settings(folder, config)
        _check_steps(config.run, step_of(resumed))
        shape = read_config(resumed).model
        lines.append(f"{folder}: continues from {resumed.name}")
    else:
        given = given_text(config.data, config.run.init_from)
        vocab_size = config.data.vocab_size if given is None else given.vocab_size
        shape = model_config(config.model, vocab_size, config.run.init_from)
    lines += saved.changes
    _check_sequences(config, shape)
    check_table_tier(shape, config.run.device, config.run.table_tier)
    lines += _sharding_lines(shape, config.run.table_sharding, replicas.count)
    init_from = "" if resumed is not None else config.run.init_from
    model = planned_model(shape, init_from, is_dense_frozen="dense" in config.run.freeze)
    memory = training_memory(model, shape, config, replicas.count)
    needs = [*_memory_lines(memory, config.run.device, replicas.local_count)]
    if checks_disk and folder is not None:
        needs += _disk_lines(memory, config.run, folder)
    # texts last: to read them may take minutes
    if resumed is None and reads_texts:
        texts = TrainingTexts(config.data, config.run.seed)
        lines += _text_lines(texts)
        if given is None:
            lines.append(_tokenizer_line(texts, config, folder))
    lines += needs
    lines += _schedule_lines(config, saved.schedule_steps)
    return RunPlan(shape, memory, saved.schedule_steps, resumed, texts, tuple(lines))


def _text_lines(texts: TrainingTexts) -> list[str]:
    """The texts in words, after all of them were read (DataError)."""
    texts.check()
    return texts.describe()


def _tokenizer_line(texts: TrainingTexts, config: TrainConfig, folder: Path | None) -> str:
    """The tokenizer in words: that of a run without a checkpoint, or a new one (DataError)."""
    if folder is not None and (saved := folder / DATA / TRAINED_TOKENIZER).exists():
        source = config.data, config.run.seed, config.run.init_from
        if is_current_data(folder / DATA, *source, texts):
            return f"tokenizer: {saved}, trained on these texts when the run began"
    return texts.check_tokenizer()


def _check_sequences(config: TrainConfig, shape: ModelConfig) -> None:
    if config.data.sequence_length > shape.max_positions:
        raise ConfigError(
            f"data.sequence_length: must be at most model.max_position_embeddings"
            f" {shape.max_positions}, not {config.data.sequence_length}"
        )


def _sharding_lines(shape: ModelConfig, sharding: str, processes: int) -> list[str]:
    """The division of tables in words (ConfigError if there are none)."""
    if sharding == "none":
        return []
    if not shape.table_names:
        raise ConfigError(
            f"run.table_sharding: {sharding} is for tables, but the model has no memory layers"
        )
    if processes == 1:
        return ["run.table_sharding: one process holds whole tables"]
    return [f"tables: divided by {sharding} among {processes} processes"]


def _check_steps(run: RunConfig, done: int) -> None:
    if run.steps < done:
        raise ConfigError(f"run.steps: must be at least the {done} steps done, not {run.steps}")


def _memory_lines(memory: TrainingMemory, device: str, processes: int) -> list[str]:
    """The memory in words (ConfigError if it does not suffice)."""
    available, sharing = _available(device), 1 if device == "cuda" else processes
    if available is not None:
        memory.check_fits(available, sharing)
    lines = memory.describe(available, sharing)
    if device == "cuda" and available is None:
        lines.append("run.device: there is no CUDA device here, so memory was not checked")
    elif memory.is_on_gpu:
        host = memory_if_known(available_memory)
        if host is not None:
            memory.check_host_fits(host, processes)
    return lines


def _available(device: str) -> AvailableMemory | None:
    if device == "cuda":
        if not torch.cuda.is_available():
            return None
        return AvailableMemory(torch.cuda.mem_get_info()[0], "free on the CUDA device")
    return memory_if_known(available_memory)


def _disk_lines(memory: TrainingMemory, run: RunConfig, folder: Path) -> list[str]:
    """The disk in words (ConfigError if it does not suffice)."""
    states = saved_states(folder / CHECKPOINTS)
    done = step_of(states[-1]) if states else 0
    planned = math.ceil(run.steps / run.checkpoint_every) - done // run.checkpoint_every
    # a checkpoint is written before the oldest is removed
    count = min(planned, max(1, MAX_STATES + 1 - len(states)))
    return [memory.disk_line(folder, count)] if count and run.steps > done else []


def _schedule_lines(config: TrainConfig, schedule_steps: int) -> list[str]:
    run, optimizer = config.run, config.optimizer
    warmup = warmup_steps(optimizer, schedule_steps)
    lines = [
        f"steps: {run.steps:,} of {run.tokens_per_step:,} tokens; a checkpoint every"
        f" {run.checkpoint_every:,} steps and at the end, of which the {MAX_STATES} newest are kept"
    ]
    if warmup != optimizer.warmup_steps:
        lines.append(
            f"optimizer.warmup_steps: {optimizer.warmup_steps:,} is not less than run.steps"
            f" {schedule_steps:,}; the warm-up takes {warmup:,} steps"
        )
    if run.steps != schedule_steps:
        late = "then stay at their final values" if run.steps > schedule_steps else "do not end it"
        lines.append(
            f"learning rates: follow the schedule of the {schedule_steps:,} steps that the run"
            f" began with, and {late}"
        )
    return lines
