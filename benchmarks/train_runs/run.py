"""``memplus bench train-run``: tokens per second of training runs, and the parts of a step."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.train_runs.measured_steps import (
    BUSY,
    QUIET,
    AllMeasured,
    MeasuredSteps,
)
from benchmarks.train_runs.step_parts import PARTS
from engine.errors import ConfigError
from server.config import cache_folder
from weights.models.prepare import prepared_folder
from weights.training.train_config import TrainConfig, read_train_config
from weights.training.trainer import Trainer

EXAMPLES = Path(__file__).parents[2] / "examples"
_DEFAULTS = ("dense", "memory_plus", "retrofit")


@dataclass(frozen=True)
class Result:
    """One line of the table, one object of the JSON file.

    Attributes:
        config: the config file, as it was named; of the defaults, its place in the repository.
        tokens_per_step: tokens of a step.
        quiet_tokens_per_s: median over the timed steps on the machine as it is.
        busy_tokens_per_s: median over the timed steps next to a busy process.
        products: share of matrix products in profiled steps, attention's excluded.
        attention: share of attention.
        lookups: share of the choice and the reads of table rows.
        optimizer: share of clipping, AdamW and sparse Adam.
        data: share of packing the batch.
        other: the rest.
    """

    config: str
    tokens_per_step: int
    quiet_tokens_per_s: float
    busy_tokens_per_s: float
    products: float
    attention: float
    lookups: float
    optimizer: float
    data: float
    other: float


def measure(configs: Sequence[Path], rounds: int, steps: int, json_file: Path | None) -> None:
    """Train each config for some steps, in turn alone and next to a busy process; print medians.

    Without ``configs`` the examples are measured. Nothing of a run is kept.

    Raises:
        ConfigError: a number is less than 1, a config does not train on the CPU, or there are no
            examples.
        DataError, CheckpointError, TrainingError: as ``Trainer``.
    """
    for name, value in (("rounds", rounds), ("steps", steps)):
        if value < 1:
            raise ConfigError(f"{name}: must be at least 1, not {value}")
    files = [(str(file), file) for file in configs] or _examples()
    read = [(name, _config(file)) for name, file in files]
    width = max(len(name) for name, _ in files)
    print(f"{'config':<{width}} {QUIET:>9} {BUSY:>9}  {'  '.join(PARTS)}")
    results: list[Result] = []
    for name, config in read:
        one = _measured(name, config, MeasuredSteps(rounds, steps))
        results.append(one)
        shares = "  ".join(f"{getattr(one, part):>{len(part)}.1%}" for part in PARTS)
        speeds = f"{one.quiet_tokens_per_s:>9,.0f} {one.busy_tokens_per_s:>9,.0f}"
        print(f"{one.config:<{width}} {speeds}  {shares}")
        if json_file is not None:
            json_file.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")


def _examples() -> list[tuple[str, Path]]:
    """The default configs, each with its place in the repository."""
    files = [(f"examples/{name}.toml", EXAMPLES / f"{name}.toml") for name in _DEFAULTS]
    if not all(file.exists() for _, file in files):
        raise ConfigError(f"configs: {EXAMPLES} has no examples; name the files to measure")
    return files


def _config(file: Path) -> TrainConfig:
    config = read_train_config(file)
    if config.run.device != "cpu":
        raise ConfigError(f"configs: {file}: run.device must be cpu, not {config.run.device}")
    return config


def _measured(name: str, config: TrainConfig, steps: MeasuredSteps) -> Result:
    run = config.run
    if run.init_from:
        run = replace(run, init_from=str(prepared_folder(run.init_from, cache_folder())))
    # the run ends before its last step, an evaluation or a checkpoint
    last = steps.count + 1
    run = replace(run, steps=last, evaluate_every=last, checkpoint_every=last)
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(config, run=run)
        trainer = Trainer(settings, Path(folder) / "run", resume=False, checks_disk=False)
        try:
            trainer.run(lambda report: steps.on_step(report, run.tokens_per_step))
        except AllMeasured:
            pass
        finally:
            steps.close()
    speeds = steps.tokens_per_s
    return Result(name, run.tokens_per_step, speeds[QUIET], speeds[BUSY], **steps.shares())
