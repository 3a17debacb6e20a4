"""Part kernels: microseconds of each kernel in a graph, beside its bytes and operations."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch

from benchmarks.gpu.card_limits import CardLimits
from benchmarks.gpu.decode import BATCHES, MODELS
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.graph_timing import replayed_us
from benchmarks.gpu.kernel_cases import (
    attention_cases,
    layer_cases,
    mixture_case,
    sampling_cases,
)
from benchmarks.gpu.kernel_inputs import KernelCase
from benchmarks.gpu.lookup_cases import lookup_cases
from benchmarks.gpu.part import PartSetup, Task
from engine.model.config import ModelConfig
from engine.model.step_work import StepWork

_DTYPE = torch.bfloat16
_ROUNDS = 7
# calls in a graph, each with other inputs: what is timed begins with nothing in the L2 cache
_CALLS, _CALLS_OF_LARGE_INPUTS, _LARGE_BYTES = 16, 4, 2**29
_PROMPT = 512
_SUBKEYS = 1024


def tasks(setup: PartSetup) -> Iterator[Task]:
    """A task per kernel, shape and number of tokens."""
    for model, config, context in MODELS:
        for batch in BATCHES:
            for case in _decode_cases(config, batch, context):
                yield _task(setup.limits, f"{model} {batch} tokens {case.name}", case)
        for case in attention_cases(config, [_PROMPT], _DTYPE, _PROMPT):
            yield _task(setup.limits, f"{model} prefill {_PROMPT} {case.name}", case)


def _decode_cases(config: ModelConfig, batch: int, context: int) -> Iterable[KernelCase]:
    yield from layer_cases(config, batch, _DTYPE, context)
    yield from sampling_cases(config.vocab_size, batch, _DTYPE)
    yield from lookup_cases(config.hidden_size, _SUBKEYS, batch)
    yield mixture_case(config, batch, _DTYPE)


def _task(limits: CardLimits, name: str, case: KernelCase) -> Task:
    return Task((name,), partial(_timed, limits, case))


def _timed(limits: CardLimits, case: KernelCase, wanted: Sequence[str]) -> Iterator[Figure]:
    first = case.inputs()
    count = _CALLS if first.size < _LARGE_BYTES else _CALLS_OF_LARGE_INPUTS
    inputs = [first, *(case.inputs() for _ in range(count - 1))]
    us = replayed_us([partial(one.call, case.kernel) for one in inputs], _ROUNDS)
    bound = StepWork(first.num_bytes, first.flops).least_seconds(limits.machine) * 1e6
    yield Figure(wanted[0], us, "us", bound or None)
