"""The training loop: batches, optimiser steps, log, evaluations and checkpoints."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from engine.model.flops import forward_flops
from engine.model.transformer import Transformer
from memory_ops.tables.trained import TrainedTable
from weights.checkpoints.table_files import OUTPUT_DTYPES
from weights.errors import TrainingError
from weights.training.compiled_layers import compile_dense
from weights.training.data_source import discard_stale_data
from weights.training.loss import batch_loss
from weights.training.new_model import new_model
from weights.training.optimizer import Optimizer, lr_share
from weights.training.replicas import Replicas
from weights.training.row_reads import (
    RowReads,
    count_reads,
    recorded_tokens,
    sampled_passages,
)
from weights.training.run_folder import CHECKPOINTS, DATA, LOG, remove_leftovers, saved_states
from weights.training.run_log import RunLog
from weights.training.run_plan import RunPlan, plan_run
from weights.training.run_record import save_settings
from weights.training.table_sharding import TableSharding
from weights.training.table_usage import TableUsage
from weights.training.token_stream import TokenStream
from weights.training.train_config import RunConfig, TrainConfig
from weights.training.train_state import TrainState
from weights.training.trained_adapter import trained_adapter
from weights.training.training_data import TrainingData, prepare_data

logger = logging.getLogger(__name__)

# names of these parts of a step in a profile of torch's
DATA_RANGE, OPTIMIZER_RANGE = "memplus data", "memplus optimizer"
# tokens of validation documents per evaluation
_EVALUATION_TOKENS = 65_536


@dataclass(frozen=True)
class StepReport:
    """Results of one step; ``loss`` is in nats per token, ``grad_norm`` is before clipping."""

    step: int
    loss: float
    lr_share: float
    grad_norm: float
    tokens_per_s: float


class Trainer:
    """A training run in its folder, new or resumed.

    Attributes:
        step: steps done.
        folder: run folder with ``data``, ``checkpoints`` and ``log.jsonl``; when the run is
            complete also with ``adapter``, if only memories beside feed-forwards were trained.
        flops: operations of one token's forward pass, by part of the model.
        num_text_tokens: tokens of the training texts.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        *,
        resume: bool,
        replicas: Replicas | None = None,
        checks_disk: bool = True,
    ) -> None:
        """Check all settings, log the plan, then prepare data and model.

        ``resume`` loads the newest checkpoint; a run without one starts again. With ``replicas``,
        all processes use the same folder, and the first process writes it. ``checks_disk`` is
        that of ``plan_run``.

        Raises:
            ConfigError: a setting is invalid.
            DataError: a text cannot be read.
            CheckpointError: a model, tokenizer or checkpoint cannot be read.
            TrainingError: the folder has a run, and ``resume`` is not set or its settings differ;
                or it has none to resume.
        """
        self.folder, self._config = folder, config
        self._replicas = replicas or Replicas()
        run, is_first = config.run, self._replicas.is_first
        options = {"resume": resume, "reads_texts": is_first, "checks_disk": checks_disk}
        plan = plan_run(config, folder, replicas=self._replicas, **options)
        if is_first:
            for line in plan.lines:
                logger.info(line)
        data, shape = self._prepared_data(plan), plan.shape
        self._sharding = TableSharding(run.table_sharding, self._replicas)
        model, tables = _model_of_run(plan, run, self._sharding)
        self._model = model
        self._adapter = trained_adapter(shape, run, folder)
        self._optimizer = Optimizer(model, list(tables.values()), config.optimizer, self._replicas)
        self._usage = {name: _usage_of(table, self._replicas) for name, table in tables.items()}
        self._stream = TokenStream(data.train, config.data.sequence_length, run.seed)
        self.flops = forward_flops(shape, self._stream.mean_attended)
        self._train_tokens, self._validation = data.train, data.validation
        self.num_text_tokens = len(data.train.ids)
        self._schedule_steps = plan.schedule_steps
        places = folder / CHECKPOINTS, model, tables, self._optimizer, data.text, self._usage
        self._state = TrainState(*places, self._replicas)
        self.step = 0
        if plan.resumed is not None:
            self.step, position = self._state.load(plan.resumed)
            self._stream.seek(position)
        self._replicas.wait()  # some may load more slowly than others
        self._check_replicas()
        self._log = RunLog(folder / LOG)
        if self._replicas.is_first:
            self._log.truncate(self.step)

    def run(
        self,
        on_step: Callable[[StepReport], bool],
        on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> None:
        """Train to the last step, or until ``on_step`` returns False after a step.

        In the first process, ``on_record`` gets each record of the log too.

        Raises:
            TrainingError: the loss or a gradient is not finite; the message names the step.
            CheckpointError: a checkpoint cannot be written; older ones are unchanged.
        """
        run = self._config.run
        continues = True
        while continues and self.step < run.steps:
            report = self._one_step()
            if self._replicas.is_first:
                record = {"kind": "step", **asdict(report)}
                self._log.write(record)
                on_record(record)
            (stopped,) = self._replicas.sum_numbers(not on_step(report))
            continues = not stopped
            if self.step % run.checkpoint_every == 0:
                self._check_replicas()
            is_last = self.step == run.steps or not continues
            self._evaluate_and_save(is_last=is_last, on_record=on_record)
        if self.step == run.steps and self._adapter is not None and self._replicas.is_first:
            self._adapter.write(saved_states(self._state.folder)[-1])

    def _evaluate_and_save(
        self, *, is_last: bool, on_record: Callable[[Mapping[str, Any]], None]
    ) -> None:
        run, step = self._config.run, self.step
        # evaluate before saving, so that a finished run has been evaluated
        if step % run.evaluate_every == 0 or step == run.steps:
            record = {"kind": "evaluation", "step": step, **self.evaluate()}
            if self._replicas.is_first:
                self._log.write(record)
                on_record(record)
        if step % run.checkpoint_every == 0 or is_last:
            if self._replicas.is_first:
                self._log.sync()  # a state's steps are in the log, whatever happens
            # with parts of tables, all processes must make the lookups of one
            counts = self._replicas.is_first or self._sharding.is_active
            is_recorded = step == run.steps and bool(self._usage) and counts
            reads = self._row_reads() if is_recorded else None
            self._state.save(step, self._stream.position, reads)

    def _row_reads(self) -> RowReads:
        """Rows that the trained model reads on a sample of its training documents."""
        run, length = self._config.run, self._config.data.sequence_length
        most = recorded_tokens(run.steps * run.tokens_per_step)
        logger.info(
            "counting row reads of %s tokens", f"{min(most, len(self._train_tokens.ids)):,}"
        )
        passages = sampled_passages(self._train_tokens, length, run.seed, most)
        return count_reads(self._model, passages, OUTPUT_DTYPES[run.dtype])

    @torch.no_grad()
    def _check_replicas(self) -> None:
        """Raise TrainingError unless all processes have the same step, weights and whole tables."""
        if self._replicas.count == 1:
            return
        for table in self._state.tables.values():
            table.synchronize()
        tables = (one.table_RV for one in self._state.tables.values() if one.shard is None)
        weights = (*self._model.parameters(), *tables)
        sums = [float(one.sum(dtype=torch.float64)) for one in weights]
        if not self._replicas.agree(self.step, math.fsum(sums)):
            raise TrainingError(
                f"step {self.step}: weights differ between processes; all must use the same"
                f" {self.folder}"
            )

    def _prepared_data(self, plan: RunPlan) -> TrainingData:
        """Create or open the run folder and its data; the first process creates them."""
        config, folder, run = self._config, self.folder, self._config.run
        if not self._replicas.is_first:
            self._replicas.wait()
        else:
            try:
                (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
                remove_leftovers(folder)
            except OSError as error:
                raise TrainingError(f"{folder}: {error.strerror}") from None
            if plan.texts is not None:
                save_settings(folder, config)
                discard_stale_data(folder / DATA, config.data, run.seed, run.init_from, plan.texts)
        data = prepare_data(
            config.data, folder / DATA, run.seed, run.init_from, plan.texts, plan.resumed
        )
        if self._replicas.is_first:
            self._replicas.wait()
        return data

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss and perplexity on held-out documents, and table usage since the last call.

        All processes must call this: each runs its part of every batch.
        """
        found: dict[str, float] = {}
        if self._validation is not None:
            config = self._config
            stream = TokenStream(self._validation, config.data.sequence_length, seed=0)
            size = config.run.tokens_per_step // config.run.passes_per_step
            passes = max(1, min(_EVALUATION_TOKENS, len(self._validation.ids)) // size)
            dtype = OUTPUT_DTYPES[config.run.dtype]
            place = self._replicas.rank, self._replicas.count
            batches = (stream.next(size).part(*place) for _ in range(passes))
            total = sum(float(batch_loss(self._model, one, dtype).nats) for one in batches)
            (total,) = self._replicas.sum_numbers(total)
            loss = total / (passes * size)
            found |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        for name, usage in self._usage.items():
            found |= {f"{name} {key}": value for key, value in usage.summary().items()}
        return found

    def _one_step(self) -> StepReport:
        run, started = self._config.run, time.perf_counter()
        step = self.step + 1
        size = run.tokens_per_step // run.passes_per_step
        nats = 0.0
        for _ in range(run.passes_per_step):
            with record_function(DATA_RANGE):
                batch = self._stream.next(size).part(self._replicas.rank, self._replicas.count)
            loss = batch_loss(self._model, batch, OUTPUT_DTYPES[run.dtype])
            (loss.total / run.tokens_per_step).backward()  # type: ignore[no-untyped-call]
            nats += float(loss.nats.detach())
        (total,) = self._replicas.sum_numbers(nats)
        if not math.isfinite(total):
            raise TrainingError(f"step {step}: the loss is {total}")
        share = lr_share(self._config.optimizer, step, self._schedule_steps)
        try:
            with record_function(OPTIMIZER_RANGE):
                norm = self._optimizer.step(share)
        except TrainingError as error:
            raise TrainingError(f"step {step}: {error}") from None
        for usage, use in zip(self._usage.values(), self._optimizer.tables.used, strict=True):
            if use is not None:
                usage.add(use)
        self.step = step
        seconds = time.perf_counter() - started
        num_tokens = run.tokens_per_step
        return StepReport(step, total / num_tokens, share, norm, num_tokens / seconds)


def _usage_of(table: TrainedTable, replicas: Replicas) -> TableUsage:
    if table.shard is None or table.shard.axis == 1:  # each process sees the reads of all
        return TableUsage(table.num_rows)
    return TableUsage(table.num_rows, table.shard.size, replicas)


def _model_of_run(
    plan: RunPlan, run: RunConfig, sharding: TableSharding
) -> tuple[Transformer, dict[str, TrainedTable]]:
    """The model of a plan and its tables, as ``new_model``, before a checkpoint is loaded."""
    model, tables = new_model(
        plan.shape,
        run.seed,
        run.init_from if plan.resumed is None else "",  # a checkpoint has all weights
        run.device,
        table_tier=run.table_tier,
        is_dense_frozen="dense" in run.freeze,
        sharding=sharding,
    )
    if run.compile:
        compile_dense(model, run.device)
    if run.checkpoint_activations:
        model.run_layer = partial(checkpoint, use_reentrant=False)
    return model, tables
