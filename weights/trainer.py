"""The training loop: batch, loss, step, log, checkpoint, over again."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from engine.model.flops import forward_flops
from weights.errors import TrainingError
from weights.loss import batch_loss
from weights.new_model import model_config, new_model
from weights.optimizer import Optimizer
from weights.run_record import check_record
from weights.schedule import lr_share
from weights.table_usage import TableUsage
from weights.token_stream import TokenStream
from weights.train_config import TrainConfig
from weights.train_state import TrainState, remove_leftovers, saved_states
from weights.training_data import prepare_data

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# of the validation documents, each time
_EVALUATED_TOKENS = 65_536


@dataclass(frozen=True)
class StepReport:
    """One step: the mean loss of its tokens in nats, the gradients' norm, and how fast it was."""

    step: int
    loss: float
    lr_share: float
    grad_norm: float
    tokens_per_s: float


class Trainer:
    """A run in its folder: made, or found there and gone on with.

    Attributes:
        step: steps done.
        folder: holds ``data``, ``checkpoints`` and ``log.jsonl``.
        flops: operations of one token's forward, by part of the model.
    """

    def __init__(self, config: TrainConfig, folder: Path, *, resume: bool) -> None:
        """Prepare data and model; ``resume`` goes back to the newest checkpoint, if there is one.

        Raises:
            ConfigError, DataError, CheckpointError: by what cannot be read.
            TrainingError: the folder has a run that is not to be resumed, or had other settings.
        """
        states = folder / "checkpoints"
        saved = saved_states(states)
        if saved and not resume:
            raise TrainingError(f"{folder}: has a run already, go on with it by --resume")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{folder}: {error.strerror}") from None
        check_record(folder, config)
        run = config.run
        self.folder = folder
        self._config = config
        data = prepare_data(config.data, folder / "data", run.seed, run.init_from)
        shape = model_config(config.model, data.text.vocab_size, run.init_from)
        model, tables = new_model(shape, run.seed, run.init_from)
        if run.checkpoint_activations:
            model.run_layer = partial(checkpoint, use_reentrant=False)
        self._model = model
        self._optimizer = Optimizer(model, list(tables.values()), config.optimizer)
        self._usage = {name: TableUsage(table.num_rows) for name, table in tables.items()}
        self._stream = TokenStream(data.train, config.data.sequence_length, run.seed)
        self.flops = forward_flops(shape, self._stream.mean_attended)
        self._validation = data.validation
        states.mkdir(exist_ok=True)
        remove_leftovers(states)
        self._state = TrainState(states, model, tables, self._optimizer, data.text)
        self.step = 0
        if saved:
            self.step, place = self._state.load(saved[-1])
            self._stream.seek(place)
        self._cut_log()

    def run(self, on_step: Callable[[StepReport], bool]) -> None:
        """Train to the last step; ``on_step`` says after each whether to go on.

        Raises:
            TrainingError: the loss or a gradient is no number; the message names the step.
            CheckpointError: a checkpoint cannot be written; older ones are left as they were.
        """
        run = self._config.run
        goes_on = True
        while goes_on and self.step < run.steps:
            report = self._one_step()
            self._log({"kind": "step", **report.__dict__})
            goes_on = on_step(report)
            is_last = self.step == run.steps or not goes_on
            if self.step % run.checkpoint_every == 0 or is_last:
                self._state.save(self.step, self._stream.place)
            if self.step % run.evaluate_every == 0 or self.step == run.steps:
                self._log({"kind": "evaluation", "step": self.step, **self.evaluate()})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss and perplexity on held-out documents, and how the tables were used."""
        found: dict[str, float] = {}
        if self._validation is not None:
            config = self._config
            stream = TokenStream(self._validation, config.data.sequence_length, seed=0)
            size = config.run.tokens_per_step // config.run.passes_per_step
            passes = max(1, min(_EVALUATED_TOKENS, len(self._validation.ids)) // size)
            dtype = _DTYPES[config.run.dtype]
            total = sum(
                float(batch_loss(self._model, stream.next(size), dtype).nats) for _ in range(passes)
            )
            loss = total / (passes * size)
            found |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        for name, usage in self._usage.items():
            found |= {f"{name} {key}": value for key, value in usage.summary().items()}
        return found

    def _one_step(self) -> StepReport:
        run, started = self._config.run, time.perf_counter()
        step = self.step + 1
        size = run.tokens_per_step // run.passes_per_step
        total = 0.0
        for _ in range(run.passes_per_step):
            loss = batch_loss(self._model, self._stream.next(size), _DTYPES[run.dtype])
            value = float(loss.nats.detach())
            if not math.isfinite(value):
                raise TrainingError(f"step {step}: the loss is {value}")
            (loss.total / run.tokens_per_step).backward()  # type: ignore[no-untyped-call]
            total += value
        share = lr_share(self._config.optimizer, step, run.steps)
        try:
            norm = self._optimizer.step(share)
        except TrainingError as error:
            raise TrainingError(f"step {step}: {error}") from None
        for usage, groups in zip(self._usage.values(), self._optimizer.tables.used, strict=True):
            if groups is not None:
                usage.add(groups)
        self.step = step
        seconds = time.perf_counter() - started
        num_tokens = run.tokens_per_step
        return StepReport(step, total / num_tokens, share, norm, num_tokens / seconds)

    def _log(self, record: dict[str, object]) -> None:
        try:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise TrainingError(f"step {self.step}: log.jsonl: {error.strerror}") from None

    def _cut_log(self) -> None:
        """Drop what was logged after the step that is gone on from."""
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
        kept = [
            line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step
        ]
        if kept != lines:
            partial = path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.rename(path)
