"""``memplus bench startup``: seconds from ``memplus serve`` to its first response."""

import json
import os
import tempfile
import time
import urllib.request
from statistics import median

from benchmarks.started_server import started_server
from server.model_options import ModelOptions


def measure(model: ModelOptions, runs: int) -> None:
    """Print the median of ``runs`` cold starts (empty cache folder) and warm starts (filled one).

    They differ only for a model that the first start prepares. The operating system's page cache
    is warm in both cases, since only root can drop it.
    """
    cold: list[float] = []
    warm: list[float] = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(_first_response_s(model, folder))
            warm.append(_first_response_s(model, folder))
    for name, seconds in (("cold", cold), ("warm", warm)):
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        print(f"{name}  {median(seconds):.1f} s to the first response ({runs} runs, {spread})")


def _first_response_s(model: ModelOptions, cache_folder: str) -> float:
    arguments = ["--model", model.model, "--device", model.device]
    start = time.perf_counter()
    with started_server(arguments, os.environ | {"MEMPLUS_CACHE": cache_folder}) as url:
        _post(url, {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0})
        return time.perf_counter() - start


def _post(url: str, body: dict[str, object]) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()
