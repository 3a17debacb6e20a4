"""``memplus serve``: starts and stops the engine process and the HTTP server."""

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import cast

import uvicorn

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.process import EngineLostError, EngineProcess
from engine.request import EngineStatistics
from server.config import (
    EngineSettings,
    HttpOptions,
    ModelOptions,
    SupervisionOptions,
    cache_folder,
)
from server.engine_client import EngineClient
from server.http.activity_log import ActivityLog
from server.http.admission import Admission
from server.http.app import create_app
from server.http.metrics import Metrics
from server.http.service import Service
from server.http.transport.connection import Connection
from server.http.transport.connection_table import ConnectionTable
from server.limits import LimitOptions
from server.listener import listen
from weights.checkpoints.chat_template import load_chat_template
from weights.checkpoints.tokenizer import load_tokenizer
from weights.models.named_models import NAMED_MODELS, WORDNET, model_folder

ENGINE_ENTRY = "server.engine_entry:main"
# time for connections to close after the last request has ended
_CLOSING_S = 5
# open files besides connections
_OTHER_FILES = 256


def serve(
    model: ModelOptions,
    engine: EngineConfig,
    http: HttpOptions,
    limits: LimitOptions,
    supervision: SupervisionOptions,
) -> None:
    """Load the model in an engine process, then answer HTTP requests until SIGINT or SIGTERM.

    It also ends when the engine process has died and no restarts are left, so that a supervisor
    can restart the server.

    Raises:
        ChatTemplateError: the model's chat template is not valid.
        CheckpointError: the model or its tokenizer cannot be read.
        ConfigError: the server cannot listen on the address.
        EngineLostError: the engine process has died and no restarts are left.
        EngineStartError: the engine could not be built.
    """
    signal.signal(signal.SIGTERM, _exit)
    _allow_files(limits.max_connections)
    folder = model_folder(model.model, cache_folder())
    # report a bad tokenizer now, before minutes are spent on loading the model
    tokenizer = load_tokenizer(folder) if folder.is_dir() else None
    if tokenizer is not None:
        tokenizer.token_name(0)  # makes the table of names now, not while streams wait
    override = Path(http.chat_template) if http.chat_template else None
    template = load_chat_template(folder, override)
    with listen(http.host, http.port) as listener:
        settings = EngineSettings(model, cache_folder(), engine)
        make_process = partial(EngineProcess, ENGINE_ENTRY, settings)
        process = make_process()
        _say(f"loading {model.model}")
        ready = process.start()
        metrics, activity = Metrics(), ActivityLog(_say)

        def observe(statistics: EngineStatistics) -> None:
            metrics.observe_step(statistics)
            activity.observe_step(statistics)

        client = EngineClient(process, observe, supervision, make_process)
        try:
            service = Service(
                model_name=http.served_model_name or _model_name(model.model),
                created=int(time.time()),
                tokenizer=tokenizer or load_tokenizer(folder),
                chat_template=template or load_chat_template(folder, override),
                limits=ready.limits,
                engine=client,
                admission=_admission(engine, http, limits, ready.limits.max_model_len, metrics),
                metrics=metrics,
                options=limits,
            )
            _Server(service, http, activity).run(sockets=[listener])
        finally:
            client.stop()
        if client.is_lost:
            message = "the engine process has died and no restarts are left (--engine-restarts)"
            raise EngineLostError(message)


class _Server(uvicorn.Server):
    """Uvicorn with a start message, throughput log lines and a deadline at shutdown."""

    def __init__(self, service: Service, http: HttpOptions, activity: ActivityLog) -> None:
        app = create_app(service, http.max_body_mib * 2**20, http.body_timeout_s, http.ui)
        backstop_s = http.shutdown_timeout_s + _CLOSING_S
        table = ConnectionTable(
            service.options.max_connections,
            service.metrics.rejections.labels("too_many_connections").inc,
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(
                    type[Connection], partial(Connection, limits=service.options, table=table)
                ),
                log_level="warning",
                timeout_graceful_shutdown=backstop_s,
            )
        )
        self._service = service
        self._activity = activity
        self._log_interval_s = http.log_interval_s
        self._log_task: asyncio.Task[None] | None = None
        self._shutdown_timeout_s = http.shutdown_timeout_s
        # uvicorn handles signals once it runs, and raises them again after it has ended
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._end)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # the loaded objects stay, and a full collection of them would stop all streams for 0.1 s
        gc.collect()
        gc.freeze()
        if self.should_exit or not sockets:
            return
        host, port = sockets[0].getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        name = self._service.model_name
        prompt = "memory (noun):" if name == WORDNET else "The capital of France is"
        body = f'{{"model": "{name}", "prompt": "{prompt}"}}'
        _say(f"serving {name} at {url}; try:")
        _say(f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'")
        if self._log_interval_s:
            self._log_task = asyncio.create_task(self._activity.run(self._log_interval_s))

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._service.engine.is_lost

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        deadline = asyncio.get_running_loop().call_later(
            self._shutdown_timeout_s, self._service.engine.end_all, "the server is shutting down"
        )
        await super().shutdown(sockets)
        deadline.cancel()
        if self._log_task is not None:
            self._log_task.cancel()

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.should_exit = True


def _admission(
    engine: EngineConfig, http: HttpOptions, limits: LimitOptions, max_len: int, metrics: Metrics
) -> Admission:
    if limits.max_bodies_mib < http.max_body_mib:
        raise ConfigError(f"max_bodies_mib: must be at least max_body_mib, {http.max_body_mib}")
    places = engine.max_num_seqs + http.max_queued_requests
    # not all requests are as long as the model allows
    tokens = limits.max_admitted_tokens or max(places // 2, 1) * max_len
    return Admission(
        {"prompts": places, "tokens": tokens, "body_bytes": limits.max_bodies_mib * 2**20},
        lambda reason: metrics.rejections.labels(reason).inc(),
    )


def _allow_files(max_connections: int) -> None:
    """Raise this process's limit of open files, so that all connections fit."""
    needed = max_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        message = f"{max_connections} need {needed} open files, but ulimit -Hn is {hard}"
        raise ConfigError(f"max_connections: {message}")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _model_name(model: str) -> str:
    # a link's own name: what it points to may be called by a hash
    return model if model in NAMED_MODELS else Path(os.path.abspath(model)).name


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
