"""Times the decode steps of requests that run together."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from engine.engine import Engine
from engine.request import Request
from engine.sampling.masks import Grammars


@dataclass(frozen=True)
class DecodeRun:
    """Requests that ran until they ended.

    Attributes:
        step_s: seconds of a step that runs one token of every request; the median.
        longest_s: the longest of these steps.
        answers: generated token ids by request id.
    """

    step_s: float
    longest_s: float
    answers: Mapping[str, Sequence[int]]


def run_requests(
    engine: Engine, requests: Sequence[Request], grammars: Grammars | None = None
) -> DecodeRun:
    """Run requests that end together on an idle engine.

    ``grammars`` compiles their grammars before the first step, so that they also begin together.

    Raises:
        RuntimeError: a request failed.
    """
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        mask = None
        if grammars is not None and request.grammar is not None:
            mask = grammars.compile(request.grammar)
        engine.add(request, mask)
    times = []
    while engine.has_work:
        start = time.perf_counter()
        output = engine.step()
        seconds = time.perf_counter() - start
        for one in output.outputs:
            if one.finish_reason == "error":
                raise RuntimeError(one.error)
            answers[one.request_id] += one.token_ids
        statistics = output.statistics
        if statistics.step_tokens == statistics.new_tokens == len(requests):
            times.append(seconds)
    return DecodeRun(median(times), max(times), answers)
