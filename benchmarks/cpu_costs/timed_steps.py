"""Times steps of a drawn model, with the limits of the machine measured in between."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

from benchmarks.cpu_costs.drawn_models import DTYPE, drawn_model
from benchmarks.engine_rounds import EngineRounds, TimedStep
from benchmarks.limit_meter import LimitMeter
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import make_executor
from engine.model.config import ModelConfig
from engine.model.machine_limits import MachineLimits
from engine.model.step_work import ModelWork

# positions of a model that has all loads
MAX_POSITIONS = 2048
_PROMPTS = (4, 16, 64, 256)
# sequences, and tokens of their prompts
_DECODES = ((1, 64), (1, 384), (2, 1536), (4, 64), (8, 256), (16, 64), (64, 64))
_STEPS = 12
_ROUNDS = 3
_ENGINE = EngineConfig(
    max_num_seqs=64, max_batched_tokens=512, kv_cache_gib=1.0, max_model_len=MAX_POSITIONS
)


@dataclass(frozen=True)
class Sample:
    """One step of a model.

    Attributes:
        work: the model's.
        limits: the machine's, around this step.
        step: the tokens that ran, and the median of the seconds.
    """

    work: ModelWork
    limits: MachineLimits
    step: TimedStep


def timed_steps(config: ModelConfig, seed: int) -> Iterator[Sample]:
    """Time prompts, each in one step, and decode steps of a model of drawn weights.

    Raises:
        ConfigError: memplus was installed without its native library.
    """
    executor = make_executor(drawn_model(config, seed), _ENGINE)
    row_bytes = config.memory.value_dim * DTYPE.itemsize if config.memory is not None else 0
    work, meter = ModelWork(config, DTYPE.itemsize, row_bytes), LimitMeter(DTYPE)
    with closing(Engine(executor, _ENGINE)) as engine:
        engine.warm_up()
        rounds = EngineRounds(engine, _ENGINE, seed)
        for length in _PROMPTS:
            yield _sample(work, meter, partial(rounds.warm_prefill, length))
        for batch, length in _DECODES:
            yield _sample(work, meter, partial(rounds.decode, batch, length, _STEPS))


def _sample(work: ModelWork, meter: LimitMeter, run: Callable[[], list[TimedStep]]) -> Sample:
    """The middle one of the steps that ``run`` returns, with the median of all seconds."""
    limits: list[MachineLimits] = []
    seconds: list[float] = []
    for _ in range(_ROUNDS):
        limits.append(meter.measure())
        steps = run()
        seconds += (step.seconds for step in steps)
    middle = replace(steps[len(steps) // 2], seconds=median(seconds))
    return Sample(work, MachineLimits.median(limits), middle)
