"""``memplus train``: a training run with a progress bar; signals end it with a checkpoint.

    torchrun --standalone --nproc-per-node 2 --no-python memplus train CONFIG.toml --out DIR

trains one model with 2 processes.
"""

import contextlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from tqdm import tqdm

from engine.errors import ConfigError
from server.cli.stop_signals import stop_signals
from server.config import cache_folder
from weights.errors import CheckpointError
from weights.models.hub import hub_model
from weights.models.named_models import NAMED_MODELS, local_name
from weights.models.prepare import prepared_folder
from weights.training.replicas import STEP_TIMEOUT, Replicas
from weights.training.report import describe_flops, remove_report, write_report
from weights.training.run_folder import newest_state, run_lock
from weights.training.run_plan import plan_run
from weights.training.run_record import saved_init_from
from weights.training.tensorboard_log import TensorboardLog
from weights.training.train_config import TrainConfig
from weights.training.trainer import StepReport, Trainer

logger = logging.getLogger(__name__)
OnRecord = Callable[[Mapping[str, Any]], None]


def run(
    config: TrainConfig,
    folder: Path | None,
    *,
    resume: bool = False,
    only_plan: bool = False,
    tensorboard: bool = False,
) -> int:
    """Train to the last step, or until SIGINT or SIGTERM; or only print the plan of the run.

    Only a plan of a new run needs no ``folder``.
    ``tensorboard`` writes the log as TensorBoard events too, to a folder of that name in the run's.
    After the first signal the step is finished and a checkpoint is written. A second signal ends
    a run of one process at once. Returns 0 after the last step, 128 + the signal's number if a
    signal stopped this process, and 1 if one stopped another process of the run.

    Raises:
        ConfigError: the device does not exist, which a plan does not need, or ``folder`` is
            missing, or as ``Trainer``.
        DataError, CheckpointError, TrainingError: as ``Trainer``, or another process trains in
            the folder.
    """
    if folder is None and (resume or not only_plan):
        raise ConfigError("out: missing; give --out DIR (only --plan of a new run needs none)")
    replicas = _replicas(config.run.device, only_plan=only_plan)
    source = _first_model(config.run.init_from, folder, resume=resume)
    config = replace(config, run=replace(config.run, init_from=source))
    if folder is None or only_plan:
        status = _plan(config, folder, replicas, resume=resume)
    else:
        with run_lock(folder) if replicas.is_first else contextlib.nullcontext():
            status = _run(config, folder, replicas, resume=resume, tensorboard=tensorboard)
    if replicas.count > 1:
        _exit_now(status)
    return status


def _first_model(name: str, folder: Path | None, *, resume: bool) -> str:
    """The folder of the model that a run starts from; a run to resume may have lost it."""
    is_optional = folder is not None and resume and newest_state(folder) is not None
    try:
        source = local_name(name)
        if source in NAMED_MODELS:
            source = str(prepared_folder(source, cache_folder()))
    except CheckpointError:
        if not is_optional:
            raise
        source = name
    if folder is not None and is_optional and source and not Path(source).exists():
        saved = saved_init_from(folder)
        if _is_of_name(saved, name):  # else its error is that of a setting that differs
            logger.warning("run.init_from: %s is gone; the run resumes without it", name)
            return saved
    return source


def _is_of_name(folder: str, name: str) -> bool:
    """Whether a name may have led to this folder: a model's, or a checkpoint of a run's."""
    if name in NAMED_MODELS:
        return Path(folder).name.startswith(name)
    from_hub = hub_model(name)
    in_cache = from_hub is not None and from_hub.cache_name in Path(folder).parts
    return in_cache or Path(folder).is_relative_to(name)


def _plan(config: TrainConfig, folder: Path | None, replicas: Replicas, *, resume: bool) -> int:
    """Check the run in each process; the first one reads the texts and prints the plan."""
    is_first = replicas.is_first
    with _group(replicas):
        plan = plan_run(config, folder, resume=resume, replicas=replicas, reads_texts=is_first)
    if is_first:
        print("\n".join(plan.lines))
    return 0


def _run(
    config: TrainConfig, folder: Path, replicas: Replicas, *, resume: bool, tensorboard: bool
) -> int:
    trainer = Trainer(config, folder, resume=resume, replicas=replicas)
    if replicas.is_first:
        print(describe_flops(trainer.flops, config.run.tokens_per_step))
        read, there = config.run.steps * config.run.tokens_per_step, trainer.num_text_tokens
        times = f"{read / there:.2g} times the {there:,} tokens of the texts"
        print(f"texts: the run reads {read:,} tokens, {times}")
        if trainer.step < config.run.steps:
            remove_report(folder)
    # torchrun forwards signals that its processes already got
    with (
        _group(replicas),
        _board(config, trainer, is_wanted=tensorboard and replicas.is_first) as board,
        stop_signals(once=replicas.count == 1) as stopped_by,
    ):
        _train(trainer, config.run.steps, stopped_by, board, is_shown=replicas.is_first)
    return _finish(trainer, config, folder, stopped_by, is_first=replicas.is_first)


@contextlib.contextmanager
def _board(config: TrainConfig, trainer: Trainer, *, is_wanted: bool) -> Iterator[OnRecord]:
    """The function that receives each record of the log."""
    if not is_wanted:
        yield lambda record: None
        return
    rates = {"dense": config.optimizer.lr, "tables": config.optimizer.table_lr}
    with TensorboardLog(trainer.folder / "tensorboard", trainer.step, rates) as board:
        yield board.write


def _finish(
    trainer: Trainer, config: TrainConfig, folder: Path, stopped_by: list[int], *, is_first: bool
) -> int:
    """Write the report of a finished run, or say how to continue it; return the exit status."""
    if trainer.step == config.run.steps:
        if is_first:
            written = write_report(folder, config, trainer.flops)
            print("\n".join(map(str, written)))
            if len(written) == 1:
                print("curves: not drawn; run `pip install matplotlib`, then this command --resume")
            print(f"to serve the model: memplus serve --model {shlex.quote(str(folder))}")
        return 0
    if not stopped_by:  # a signal stopped another process
        return 1
    if is_first:
        name = signal.Signals(stopped_by[0]).name
        print(f"{folder}: stopped by {name} after step {trainer.step}; continue with --resume")
    return 128 + stopped_by[0]


def _exit_now(status: int) -> None:
    """End the process without finalizing the interpreter.

    Threads of gloo may outlive the process group; a thread that then releases a tensor while the
    interpreter finalizes aborts the process (seen in 1 of 50 finished runs).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _train(
    trainer: Trainer, steps: int, stopped_by: list[int], on_record: OnRecord, *, is_shown: bool
) -> None:
    with tqdm(total=steps, initial=trainer.step, unit="step", disable=not is_shown) as bar:

        def show(report: StepReport) -> bool:
            bar.update()
            bar.set_postfix(loss=f"{report.loss:.3f}", tokens_per_s=f"{report.tokens_per_s:.0f}")
            return not stopped_by

        def on_any(record: Mapping[str, Any]) -> None:
            on_record(record)
            if record["kind"] == "evaluation" and "loss" in record:
                held_out = f"held-out loss {record['loss']:.3f}"
                bar.write(
                    f"step {record['step']}: {held_out}, perplexity {record['perplexity']:.4g}"
                )

        trainer.run(show, on_any)


@contextlib.contextmanager
def _group(replicas: Replicas) -> Iterator[None]:
    """Leave the group of processes at the end."""
    try:
        yield
    finally:
        if replicas.count > 1:
            distributed.destroy_process_group()


def _replicas(device: str, *, only_plan: bool) -> Replicas:
    """The processes that torchrun started, or this process alone, which may plan without a GPU."""
    is_one = not distributed.is_torchelastic_launched()
    if device == "cuda" and not torch.cuda.is_available() and not (is_one and only_plan):
        raise ConfigError("run.device: cuda needs a CUDA device, but none is available")
    if is_one:
        return Replicas()
    backend = "gloo"
    if device == "cuda":  # not run on several GPUs
        _take_gpu(distributed.get_node_local_rank())
        backend = "nccl"
    distributed.init_process_group(backend, timeout=STEP_TIMEOUT)
    return Replicas.of_group(device)


def _take_gpu(local_rank: int) -> None:
    """Make this process use its GPU, before NCCL or a table uses the first one."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"run.device: process {local_rank} of this machine needs a GPU for itself, but torch"
            f" finds {count}"
        )
    torch.cuda.set_device(local_rank)
