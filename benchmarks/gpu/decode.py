"""Part decode: tokens per second of SmolLM2's and Llama-3-8B's shape, beside their rooflines.

With bf16 weights and, outside the core, weights of 8 and 4 bits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median

import torch

from benchmarks.engine_rounds import TimedStep
from benchmarks.gpu.card_limits import CardLimits
from benchmarks.gpu.drawn_engine import warm_rounds
from benchmarks.gpu.drawn_models import drawn_model, round_weights
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.part import PartSetup, Task
from benchmarks.gpu.roofline import Roofline, measured_rate
from benchmarks.model_shapes import LLAMA_8B_SHAPE, SMOLLM2_SHAPE
from engine.model.config import ModelConfig
from engine.model.weight_bits import WEIGHT_BITS
from weights.checkpoints.stored_groups import requested_formats

BATCHES, PROMPT_LENGTHS = (1, 8, 32, 64), (512, 2048)
# name, shape, and tokens in the context when the timed steps begin
MODELS = (("smollm2", SMOLLM2_SHAPE, 256), ("llama-3-8b", LLAMA_8B_SHAPE, 512))
_STEPS = 64


def tasks(setup: PartSetup) -> Iterator[Task]:
    """A task per model."""
    rounds = 1 if setup.is_core else 3
    for name, config, context in MODELS:
        for weight_dtype in ("auto",) if setup.is_core else ("auto", *WEIGHT_BITS):
            title = name if weight_dtype == "auto" else f"{name} {weight_dtype}"
            figures = [f"{title} decode {batch}" for batch in BATCHES]
            figures += [f"{title} prefill {length}" for length in PROMPT_LENGTHS]
            run = partial(_measured, setup.limits, title, config, weight_dtype, context, rounds)
            yield Task((f"{title} warm-up", *figures), run)


def _measured(
    limits: CardLimits,
    name: str,
    config: ModelConfig,
    weight_dtype: str,
    context: int,
    num_rounds: int,
    wanted: Sequence[str],
) -> Iterator[Figure]:
    formats = {} if weight_dtype == "auto" else requested_formats(config, weight_dtype)
    roofline = Roofline(config, limits, formats=formats)
    model = drawn_model(config, torch.bfloat16)
    round_weights(model, formats)
    begun = time.perf_counter()
    rounds = warm_rounds(model)
    yield Figure(f"{name} warm-up", time.perf_counter() - begun, "s")
    runs: dict[str, Callable[[], list[TimedStep]]] = {
        f"{name} decode {batch}": partial(rounds.decode, batch, context, _STEPS)
        for batch in BATCHES
    }
    runs |= {
        f"{name} prefill {length}": partial(rounds.prefill, length) for length in PROMPT_LENGTHS
    }
    for figure, run in runs.items():
        if figure in wanted:
            run()  # warms up what graphs do not hold
            done = [run() for _ in range(num_rounds)]
            rate = median(measured_rate(steps) for steps in done)
            yield Figure(figure, rate, "tokens/s", roofline.tokens_per_s(done[0]))
