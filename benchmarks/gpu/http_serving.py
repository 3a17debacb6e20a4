"""Part http: tokens per second of a real server, compared with the same requests without HTTP."""

import asyncio
import gc
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.completion_client import CompletionClient
from benchmarks.gpu.drawn_models import GPU, copied
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.part import PartSetup, Skipped, Task
from benchmarks.load_run import LoadRun
from benchmarks.serving_load import FIRST_ID, LoadPoint, ServingLoad
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import make_executor
from engine.request import Request
from engine.sampling.params import SamplingParams
from server.config import cache_folder

_PACKAGES = (
    *("fastapi", "jinja2", "prometheus_client", "pydantic", "safetensors"),
    *("sentencepiece", "tokenizers", "tqdm", "uvicorn"),
)
_STREAMS = (1, 32)
_TOKENS = 128  # of a prompt, and of an answer
_ROUNDS = 4  # requests per stream
_VOCABULARY = 1000  # ids that every model has
_TIMEOUT_S = 300.0


def tasks(setup: PartSetup) -> Iterator[Task]:
    """One task: both ways of serving one model."""
    ways = "offline", "http", "http / offline"
    names = [f"{way} {count}" for count in _STREAMS for way in ways]
    yield Task(tuple(names), partial(_measured, setup.served_model))


def _measured(model: str, wanted: Sequence[str]) -> Iterator[Figure]:
    """All figures.

    Raises:
        Skipped: a package is missing.
        RuntimeError: the server does not start, or a request fails.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"needs {', '.join(missing)}")
    offline = {}
    for number, rate in _offline_rates(model):
        offline[number] = rate
        yield Figure(f"offline {number}", rate, "tokens/s")
    # the server takes all memory that is free
    gc.collect()
    torch.cuda.empty_cache()
    with _server(model) as url:
        for number in _STREAMS:
            rate = asyncio.run(_http_rate(_load(model, url), number))
            yield Figure(f"http {number}", rate, "tokens/s", offline[number])
            yield Figure(f"http / offline {number}", rate / offline[number], "ratio")


def _load(model: str, url: str) -> ServingLoad:
    return ServingLoad(
        base_url=url,
        model=model,
        input_len=_TOKENS,
        output_len=_TOKENS,
        seed=0,
        vocab_size=FIRST_ID + _VOCABULARY,
        timeout_s=_TIMEOUT_S,
    )


def _offline_rates(model: str) -> Iterator[tuple[int, float]]:
    """Answer tokens per second of an engine in this process, by number of streams."""
    from weights.checkpoints.checkpoint import load_model
    from weights.models.prepare import prepared_folder

    on_cpu, _ = load_model(prepared_folder(model, cache_folder()))
    dtype = on_cpu.model.embed_tokens.weight.dtype
    config = EngineConfig()
    engine = Engine(make_executor(copied(on_cpu, GPU, dtype), config), config)
    engine.warm_up()
    for number in _STREAMS:
        for is_timed in (False, True):
            begun = time.perf_counter()
            _answer(engine, number, f"{number} {is_timed}")
        yield number, number * _ROUNDS * _TOKENS / (time.perf_counter() - begun)


def _answer(engine: Engine, number: int, purpose: str) -> None:
    """Answer the requests of this many streams, each of which sends the next after an answer."""
    rng = _load("", "http://offline").rng(purpose)
    params = SamplingParams(max_tokens=_TOKENS, temperature=0, ignore_eos=True)
    prompts = [
        tuple(rng.randrange(FIRST_ID, FIRST_ID + _VOCABULARY) for _ in range(_TOKENS))
        for _ in range(number * _ROUNDS)
    ]
    waiting = [Request(str(one), ids, params) for one, ids in enumerate(prompts)]
    for _ in range(number):
        engine.add(waiting.pop())
    while engine.has_work:
        for output in engine.step().outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            if output.finish_reason is not None and waiting:
                engine.add(waiting.pop())


async def _http_rate(load: ServingLoad, number: int) -> float:
    client = CompletionClient(load.base_url, load.timeout_s)
    point = LoadPoint(number, None, number * _ROUNDS)
    try:
        for purpose in ("warm-up", "timed"):
            bodies = load.bodies(load.rng(f"{purpose} {number}"), point.num_prompts)
            run = LoadRun(client, load, lambda: None)
            begun = time.perf_counter()
            await run.send_concurrently(bodies, number)
            seconds = time.perf_counter() - begun
            if run.failures:
                raise RuntimeError(f"a request failed: {run.failures.most_common(1)[0][0]}")
    finally:
        client.close()
    return point.num_prompts * load.output_len / seconds


@contextmanager
def _server(model: str) -> Iterator[str]:
    """The URL of a server on the GPU, which ends with the context."""
    command = [sys.executable, "-m", "server.cli.main", "serve", "--port", "0"]
    command += ["--model", model, "--device", "cuda"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            lines = []
            for line in server.stderr:
                lines.append(line.strip())
                if " at http://" in line:
                    break
            else:
                raise RuntimeError(f"the server did not start: {lines[-1] if lines else '?'}")
            yield lines[-1].split(" at ")[1].split(";")[0]
        finally:
            server.terminate()
            server.communicate()
