"""Times a server that loads row patches while it answers requests."""

import asyncio
import http.client
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import uvloop

from benchmarks.completion_client import Completion, CompletionClient
from benchmarks.http_answer import ResponseError
from benchmarks.patches.drawn_patches import drawn_tables
from benchmarks.started_server import started_server
from memory_ops.patches.patched_rows import patched_bytes
from server.model_options import ModelOptions
from weights.errors import PatchError
from weights.patches.description import PatchDescription
from weights.patches.model_identity import ModelIdentity, model_identity
from weights.patches.patch_folder import StoredPatch, stored_patch, write_patch

_NAME = "patched"
_PROMPT = "Row patch number {}:"
_TIMEOUT_S, _TOKENS = 600.0, 128
# seconds between two loads
_PAUSE_S = 0.3
_ROUTE = "/v1/memory/patches"
_JSON = {"Content-Type": "application/json"}
_BF16_BYTES = 2


@dataclass(frozen=True)
class LoadedWhileServing:
    """Loads over HTTP while ``batch`` answers are streamed.

    Attributes:
        patch_rows: rows of each loaded patch.
        patch_bytes: bytes of the ids and deltas of each.
        load_ms: from sending ``POST /v1/memory/patches`` to its response.
        median_load_ms, longest_load_ms: of these times.
        step_ms: between two tokens of an answer, while no patch was loaded; the median.
        longest_ms: the longest of these times.
        longest_loading_ms: the same, while a patch was loaded.
    """

    batch: int
    patch_rows: int
    patch_bytes: int
    load_ms: tuple[float, ...]
    median_load_ms: float
    longest_load_ms: float
    step_ms: float
    longest_ms: float
    longest_loading_ms: float


def measure_loading(
    model: ModelOptions, folder: Path, batches: Sequence[int], num_rows: int, rounds: int
) -> Iterator[LoadedWhileServing]:
    """Serve a folder; for each batch load ``rounds`` drawn patches, after one that does not count.

    Raises:
        EngineStartError: the server did not start.
        PatchError: it refused a patch, or an answer failed.
    """
    names = [f"p{number}" for number in range(rounds + 1)]
    identity = model_identity(folder)
    with tempfile.TemporaryDirectory() as kept:
        for seed, name in enumerate(names):
            patch = _write(identity, Path(kept) / name, num_rows, seed)
        arguments = ["--model", model.model, "--device", model.device, "--dtype", model.dtype]
        arguments += ["--served-model-name", _NAME, "--patch-dir", kept]
        arguments += ["--max-num-seqs", str(max(batches))]
        arguments += patch_limits(identity.shapes, num_rows, len(names))
        with (
            started_server(arguments) as url,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            for batch in batches:
                answers, loads = runner.run(_load_all(url, batch, names))
                yield _timed(batch, patch, answers, loads)


def patch_limits(shapes: Mapping[str, tuple[int, int]], num_rows: int, count: int) -> list[str]:
    """Options of a server that loads ``count`` drawn patches of ``num_rows`` rows."""
    each = num_rows // len(shapes)
    size = sum(patched_bytes(each, value_dim, _BF16_BYTES) for _, value_dim in shapes.values())
    gib = math.ceil(count * size / 2**20) / 2**10
    limits = ["--max-patches", str(count), "--max-patch-rows", str(num_rows)]
    return [*limits, "--patch-memory-gib", str(gib)]


def _write(identity: ModelIdentity, folder: Path, num_rows: int, seed: int) -> StoredPatch:
    """Write a drawn patch."""
    tables = drawn_tables(seed, identity.shapes, num_rows)
    description = PatchDescription(identity.origins, identity.row_choice, identity.shapes)
    patch = stored_patch(description, tables)
    write_patch(folder, patch)
    return patch


async def _load_all(
    url: str, batch: int, names: Sequence[str]
) -> tuple[list[Completion], list[tuple[float, float]]]:
    """The answers, and the start and end of each load. Then the patches are removed."""
    client, is_done = CompletionClient(url, _TIMEOUT_S), asyncio.Event()
    answers: list[Completion] = []

    async def answer(number: int) -> None:
        while not is_done.is_set():
            try:
                answers.append(await client.complete(_body(number)))
            except ResponseError as error:
                raise PatchError(f"one of {batch} answers failed: {error}") from None

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(batch):
                group.create_task(answer(number))
            loads = []
            for name in names:
                await asyncio.sleep(_PAUSE_S)
                body = json.dumps({"name": name})
                loads.append(await asyncio.to_thread(_ask, url, "POST", _ROUTE, body))
            await asyncio.sleep(_PAUSE_S)
            is_done.set()
        for name in names:
            _ask(url, "DELETE", f"{_ROUTE}/{name}")
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    finally:
        client.close()
    return answers, loads


def _body(number: int) -> bytes:
    asked = {"model": _NAME, "prompt": _PROMPT.format(number), "max_tokens": _TOKENS}
    asked |= {"temperature": 0, "ignore_eos": True, "stream": True}
    return json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()


def _ask(url: str, method: str, path: str, body: str | None = None) -> tuple[float, float]:
    """When a request was sent, and when its response had arrived; PatchError if it failed."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S)
    start = time.perf_counter()
    try:
        connection.request(method, path, body, _JSON)
        response = connection.getresponse()
        text = response.read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise PatchError(f"{method} {path} failed: {error}") from None
    finally:
        connection.close()
    end = time.perf_counter()
    if response.status != http.HTTPStatus.OK:
        raise PatchError(f"{method} {path} {body or ''}: HTTP {response.status}: {text}")
    return start, end


def _timed(
    batch: int,
    patch: StoredPatch,
    answers: Sequence[Completion],
    loads: Sequence[tuple[float, float]],
) -> LoadedWhileServing:
    quiet, loading = _gaps(answers, loads[0], loads[1:])
    load_ms = tuple(1e3 * (end - start) for start, end in loads[1:])
    return LoadedWhileServing(
        batch=batch,
        patch_rows=patch.num_rows,
        patch_bytes=patch.num_bytes,
        load_ms=load_ms,
        median_load_ms=median(load_ms),
        longest_load_ms=max(load_ms),
        step_ms=1e3 * median(quiet),
        longest_ms=1e3 * max(quiet),
        longest_loading_ms=1e3 * max(loading),
    )


def _gaps(
    answers: Sequence[Completion],
    first: tuple[float, float],
    loads: Sequence[tuple[float, float]],
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
