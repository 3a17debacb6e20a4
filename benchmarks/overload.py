"""``memplus bench overload``: throughput and refusals of a server with too many requests."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import uvloop

from benchmarks.completion_client import Completion, CompletionClient
from benchmarks.load_run import LoadRun
from benchmarks.overload_options import OverloadOptions
from benchmarks.serving_load import ServingLoad
from benchmarks.serving_metrics import Latency
from benchmarks.started_server import started_server
from engine.config import EngineConfig
from server.model_options import ModelOptions

LEAST_SHARE = 0.9
MOST_REFUSAL_MS = 100.0
_NAME = "overloaded"


@dataclass(frozen=True)
class OverloadResult:
    """Measurements of one run.

    Attributes:
        capacity: generated tokens per second while as many requests are in flight as run at the
            same time; before the overload, and after it.
        throughput: the same under overload.
        requests_per_s: requests sent per second under overload.
        completed: requests that were admitted and answered in full.
        refusals: response times of the refused requests; None if none was refused.
        num_refused: refused requests.
        lost: other requests, by what happened to them.
    """

    capacity: tuple[float, float]
    throughput: float
    requests_per_s: float
    completed: int
    refusals: Latency | None
    num_refused: int
    lost: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Throughput under overload, as a fraction of the best."""
        return self.throughput / max(*self.capacity, self.throughput)

    def misses(self) -> list[str]:
        """The bars that were missed."""
        found = [f"{count} requests were lost: {reason}" for reason, count in self.lost.items()]
        if self.share < LEAST_SHARE:
            found.append(f"the throughput is less than {LEAST_SHARE:.0%} of the best")
        if self.refusals is None:
            found.append("no request was refused")
        elif self.refusals.p99 >= MOST_REFUSAL_MS:
            found.append(f"the 99th percentile of refusals is not under {MOST_REFUSAL_MS:g} ms")
        return found

    def describe(self) -> str:
        """The measurements in a few lines."""
        before, after = self.capacity
        lines = [
            f"at capacity     {before:.1f} tokens per second before, {after:.1f} after",
            f"under overload  {self.throughput:.1f} tokens per second, {self.share:.1%} of best",
            f"sent            {self.requests_per_s:.1f} requests per second",
            f"answered        {self.completed}",
        ]
        if self.refusals is not None:
            median, p99 = self.refusals.median, self.refusals.p99
            lines.append(
                f"refused         {self.num_refused}, median {median:.1f} ms, p99 {p99:.1f} ms"
            )
        return "\n".join([*lines, *(f"missed: {miss}" for miss in self.misses())])


def measure(model: ModelOptions, options: OverloadOptions, json_file: Path | None) -> int:
    """Serve a model, overload it, and print the result; 1 if a bar is missed, else 0."""
    arguments = ["--model", model.model, "--device", model.device, "--served-model-name", _NAME]
    arguments += ["--max-queued-requests", str(options.max_queued_requests)]
    with started_server(arguments) as url:
        # random words: their number is about that of tokens in any vocabulary
        load = ServingLoad(
            base_url=url,
            model=_NAME,
            input_len=options.input_len,
            output_len=options.output_len,
            seed=options.seed,
            prompt_as="text",
        )
        print(f"{model.model}, seed {options.seed}, {options.factor:g} times the capacity")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(_overload(load, options))
    print(result.describe(), flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(result), indent=1) + "\n")
    return 1 if result.misses() else 0


async def _overload(load: ServingLoad, options: OverloadOptions) -> OverloadResult:
    client = CompletionClient(load.base_url, load.timeout_s)
    try:
        before, lost = await _capacity(client, load, options, "before")
        rate = options.factor * before / load.output_len
        run = LoadRun(client, load, lambda: None)
        rng = load.rng("overload")
        window = _window(options)
        await run.send_at_rate(_bodies_until(window[1], load, "overloading"), rate, rng)
        after, lost_after = await _capacity(client, load, options, "after")
    finally:
        client.close()
    refused = {text for text in run.failures if text.startswith("HTTP 503")}
    kept = {text: count for text, count in run.failures.items() if text not in refused}
    return OverloadResult(
        capacity=(before, after),
        throughput=_tokens_per_s(run.completions, window),
        requests_per_s=rate,
        completed=len(run.completions),
        refusals=Latency.of(run.refusals),
        num_refused=len(run.refusals),
        lost=lost | lost_after | kept,
    )


async def _capacity(
    client: CompletionClient, load: ServingLoad, options: OverloadOptions, purpose: str
) -> tuple[float, dict[str, int]]:
    """Tokens per second with full batches, and the failed requests by reason.

    Like those of an overloaded server, the requests begin and end at different times.
    """
    run, window = LoadRun(client, load, lambda: None), _window(options)
    bodies = _bodies_until(window[1], load, purpose)
    concurrency = EngineConfig.max_num_seqs
    await run.send_concurrently(bodies, concurrency, options.ramp_s / concurrency)
    return _tokens_per_s(run.completions, window), dict(run.failures)


def _window(options: OverloadOptions) -> tuple[float, float]:
    """The times from which and to which tokens count: the first seconds fill the batch."""
    begin = time.perf_counter() + options.ramp_s
    return begin, begin + options.window_s


def _bodies_until(end: float, load: ServingLoad, purpose: str) -> Iterator[bytes]:
    rng = load.rng(purpose)
    while time.perf_counter() < end:
        yield from load.bodies(rng, 1)


def _tokens_per_s(completions: list[Completion], window: tuple[float, float]) -> float:
    """Tokens that arrived in the window; several of one event count as equal parts of it."""
    begin, end = window
    tokens = 0.0
    for completion in completions:
        inside = sum(begin <= moment < end for moment in completion.token_times)
        per_event = completion.usage.generated_tokens / len(completion.token_times)
        tokens += inside * per_event
    return tokens / (end - begin)
