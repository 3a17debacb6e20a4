"""``memplus serve``: starts and stops the engine process and the HTTP server."""

import asyncio
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType

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
from server.http.grammar_checker import GrammarChecker
from server.http.metrics import Metrics
from server.http.service import Service
from weights.checkpoints.tokenizer import load_tokenizer
from weights.models.named_models import NAMED_MODELS, WORDNET, model_folder

ENGINE_ENTRY = "server.engine_entry:main"
# time for connections to close after the last request has ended
_CLOSING_S = 5


def serve(
    model: ModelOptions, engine: EngineConfig, http: HttpOptions, supervision: SupervisionOptions
) -> None:
    """Load the model in an engine process, then answer HTTP requests until SIGINT or SIGTERM.

    It also ends when the engine process has died and no restarts are left, so that a supervisor
    can restart the server.

    Raises:
        CheckpointError: the model or its tokenizer cannot be read.
        ConfigError: the server cannot listen on the address.
        EngineLostError: the engine process has died and no restarts are left.
        EngineStartError: the engine could not be built.
    """
    signal.signal(signal.SIGTERM, _exit)
    folder = model_folder(model.model, cache_folder())
    # report a bad tokenizer now, before minutes are spent on loading the model
    tokenizer = load_tokenizer(folder) if folder.is_dir() else None
    with _listen(http) as listener:
        settings = EngineSettings(model, cache_folder(), engine)
        make_process = partial(EngineProcess, ENGINE_ENTRY, settings)
        process = make_process()
        _say(f"loading {model.model}")
        ready = process.start()
        metrics, activity = Metrics(), ActivityLog(_say)

        def observe(statistics: EngineStatistics) -> None:
            metrics.observe_step(statistics)
            activity.observe_step(statistics)

        grammars = GrammarChecker(folder, ready.limits)
        client = EngineClient(process, observe, supervision, make_process)
        try:
            service = Service(
                model_name=http.served_model_name or _model_name(model.model),
                created=int(time.time()),
                tokenizer=tokenizer or load_tokenizer(folder),
                limits=ready.limits,
                engine=client,
                admission=Admission(
                    engine.max_num_seqs + http.max_queued_requests,
                    metrics.rejections.labels("queue_full").inc,
                ),
                metrics=metrics,
                grammars=grammars,
            )
            _Server(service, http, activity).run(sockets=[listener])
        finally:
            client.stop()
            grammars.stop()
        if client.is_lost:
            message = "the engine process has died and no restarts are left (--engine-restarts)"
            raise EngineLostError(message)


class _Server(uvicorn.Server):
    """Uvicorn with a start message, throughput log lines and a deadline at shutdown."""

    def __init__(self, service: Service, http: HttpOptions, activity: ActivityLog) -> None:
        app = create_app(service, http.max_body_mib * 2**20, http.body_timeout_s)
        backstop_s = http.shutdown_timeout_s + _CLOSING_S
        super().__init__(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=backstop_s)
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


def _listen(http: HttpOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    try:
        return socket.create_server((http.host, http.port), family=family, backlog=2048)
    except OSError as error:
        address = f"{http.host} port {http.port}"
        raise ConfigError(f"host: cannot listen on {address}: {error.strerror}") from None


def _model_name(model: str) -> str:
    return model if model in NAMED_MODELS else Path(model).resolve().name


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
