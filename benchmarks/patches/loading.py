"""Times a server that loads row patches while it answers requests."""

import asyncio
import http.client
import itertools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import torch
import uvloop

from benchmarks.completion_client import Completion, CompletionClient
from benchmarks.started_server import started_server
from server.config import ModelOptions
from weights.patches.description import PatchDescription
from weights.patches.model_identity import model_identity
from weights.patches.patch_folder import stored_patch, write_patch

_NAME, _DELTA = "patched", 1e-6
_PROMPT = "Row patch number {}:"
_TIMEOUT_S, _TOKENS = 600.0, 128
# seconds between two loads
_PAUSE_S = 0.3
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class LoadedWhileServing:
    """Loads over HTTP while ``batch`` answers are streamed.

    Attributes:
        patch_rows: rows of each loaded patch.
        patch_bytes: bytes of the ids and deltas of each.
        load_ms: from sending ``POST /v1/memory/patches`` to its response.
        step_ms: between two tokens of an answer, while no patch was loaded; the median.
        longest_ms: the longest of these times.
        longest_loading_ms: the same, while a patch was loaded.
    """

    batch: int
    patch_rows: int
    patch_bytes: int
    load_ms: tuple[float, ...]
    step_ms: float
    longest_ms: float
    longest_loading_ms: float


def measure_loading(
    model: ModelOptions, folder: Path, batch: int, num_rows: int, rounds: int
) -> LoadedWhileServing:
    """Serve a folder and load ``rounds`` patches of drawn rows, after one that does not count.

    Raises:
        RuntimeError: the server did not start, or refused a patch.
        ResponseError: an answer failed.
    """
    with tempfile.TemporaryDirectory() as kept:
        patches = Path(kept)
        num_bytes = [_write(folder, patches / f"p{n}", num_rows, n) for n in range(rounds + 1)]
        arguments = ["--model", model.model, "--device", model.device, "--dtype", model.dtype]
        arguments += ["--served-model-name", _NAME, "--patch-dir", kept]
        with (
            started_server(arguments) as url,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            answers, loads = runner.run(_load_all(url, batch, rounds + 1))
    quiet, loading = _gaps(answers, loads[0], loads[1:])
    return LoadedWhileServing(
        batch=batch,
        patch_rows=num_rows,
        patch_bytes=num_bytes[0],
        load_ms=tuple(1e3 * (end - start) for start, end in loads[1:]),
        step_ms=1e3 * median(quiet),
        longest_ms=1e3 * max(quiet),
        longest_loading_ms=1e3 * max(loading),
    )


def _write(model: Path, patch: Path, num_rows: int, seed: int) -> int:
    """Write a patch of drawn rows; returns its bytes."""
    generator = torch.Generator().manual_seed(seed)
    identity, tables = model_identity(model), {}
    count = num_rows // len(identity.shapes)
    for name, (rows, value_dim) in identity.shapes.items():
        rows_P = torch.randperm(rows, generator=generator)[:count].sort().values
        deltas_PV = torch.randn(len(rows_P), value_dim, generator=generator) * _DELTA
        tables[name] = rows_P, deltas_PV.bfloat16()
    description = PatchDescription(identity.origins, identity.row_choice, identity.shapes)
    write_patch(patch, stored_patch(description, tables))
    return sum(tensor.nbytes for pair in tables.values() for tensor in pair)


async def _load_all(
    url: str, batch: int, count: int
) -> tuple[list[Completion], list[tuple[float, float]]]:
    """The answers, and the start and end of each load."""
    client, is_done = CompletionClient(url, _TIMEOUT_S), asyncio.Event()
    answers: list[Completion] = []

    async def answer(number: int) -> None:
        while not is_done.is_set():
            answers.append(await client.complete(_body(number)))

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(batch):
                group.create_task(answer(number))
            loads = []
            for number in range(count):
                await asyncio.sleep(_PAUSE_S)
                loads.append(await asyncio.to_thread(_post, url, f"p{number}"))
            await asyncio.sleep(_PAUSE_S)
            is_done.set()
    finally:
        client.close()
    return answers, loads


def _body(number: int) -> bytes:
    asked = {"model": _NAME, "prompt": _PROMPT.format(number), "max_tokens": _TOKENS}
    asked |= {"temperature": 0, "ignore_eos": True, "stream": True}
    return json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()


def _post(url: str, name: str) -> tuple[float, float]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S)
    start = time.perf_counter()
    connection.request("POST", "/v1/memory/patches", json.dumps({"name": name}), _JSON)
    response = connection.getresponse()
    text = response.read().decode()
    end = time.perf_counter()
    connection.close()
    if response.status != http.HTTPStatus.OK:
        raise RuntimeError(f"{name} was not loaded: {text}")
    return start, end


def _gaps(
    answers: list[Completion], first: tuple[float, float], loads: list[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """Seconds between two tokens of an answer: without a load, and those that a load overlaps.

    Times up to the end of the first load do not count: it waits for the hashes of the model.
    """
    quiet: list[float] = []
    loading: list[float] = []
    for answer in answers:
        for before, after in itertools.pairwise(answer.token_times):
            if before < first[1]:
                continue
            is_loading = any(before < end and start < after for start, end in loads)
            (loading if is_loading else quiet).append(after - before)
    return quiet, loading
