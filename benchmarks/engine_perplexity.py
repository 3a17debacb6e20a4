"""Perplexity of texts by an engine: its weights, activations and KV cache as they are served."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from engine.engine import Engine
from engine.errors import ConfigError
from engine.request import Request
from engine.sampling.params import SamplingParams

_AT_ONCE = 64  # requests
_SCORED = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=0)


def perplexity(engine: Engine, prompts: Iterable[Sequence[int]]) -> float:
    """exp of the mean negative log-probability of all tokens but the first of each prompt.

    The engine must be idle, and the prompts must fit into its context.

    Raises:
        ConfigError: no prompt has two tokens.
        RuntimeError: a request failed.
    """
    waiting = _requests(prompts)
    scores: list[float] = []
    in_flight = 0
    while True:
        for request in islice(waiting, _AT_ONCE - in_flight):
            engine.add(request)
            in_flight += 1
        if not in_flight:
            break
        for ended in engine.step().outputs:
            if ended.finish_reason == "error":
                raise RuntimeError(ended.error)
            scores += [one.logprob for one in ended.prompt_logprobs]
            in_flight -= ended.finish_reason is not None
    if not scores:
        raise ConfigError("text: must have at least two tokens")
    return math.exp(-sum(scores) / len(scores))


def _requests(prompts: Iterable[Sequence[int]]) -> Iterator[Request]:
    for number, ids in enumerate(prompts):
        if len(ids) > 1:
            yield Request(f"text-{number}", tuple(ids), _SCORED)
