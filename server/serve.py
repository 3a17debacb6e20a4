"""``memplus serve``: starts and stops the engine process and the HTTP server."""

import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.process import EngineLostError
from server.access import AccessOptions
from server.config import HttpOptions, ModelOptions, SupervisionOptions, environment_api_keys
from server.http.app import create_app
from server.http.front import Front
from server.http.gate import Gate
from server.http.service import Service
from server.http_server import HttpServer
from server.logs import say
from server.monitoring import MonitoringOptions
from server.served_model import ServedModel
from server.unix_socket import unix_socket
from weights.models.named_models import WORDNET

logger = logging.getLogger(__name__)
# time for responses to reach their clients after the last request has ended
_CLOSING_S = 1


def serve(
    model: ModelOptions,
    engine: EngineConfig,
    http: HttpOptions,
    supervision: SupervisionOptions,
    access: AccessOptions,
    monitoring: MonitoringOptions,
) -> None:
    """Load the model in an engine process and answer HTTP requests until SIGINT or SIGTERM.

    It also ends when the engine process has died and no restarts are left, so that a supervisor
    can restart the server.

    Raises:
        ChatTemplateError: the model's chat template is not valid.
        CheckpointError: the model or its tokenizer cannot be read.
        ConfigError: the server cannot listen on the address, or a key or certificate is not valid.
        EngineLostError: the engine process has died and no restarts are left.
        EngineStartError: the engine could not be built.
    """
    signal.signal(signal.SIGTERM, _exit)
    keys = access.keys(environment_api_keys())
    access.check_tls()
    served = ServedModel(model, engine, http, supervision, monitoring)
    gate = Gate()

    async def on_ready(service: Service) -> None:
        gate.open(create_app(service, http.max_body_mib * 2**20, http.body_timeout_s))
        _announce(service.model_name, listener, access, needs_key=bool(keys))
        if monitoring.log_interval_s:
            await served.activity.run(monitoring.log_interval_s)

    with _listening(http, access) as listener:
        if not keys:
            _warn_if_public(listener)
        front = Front(gate, access, keys, access_log=monitoring.access_log)
        config = _uvicorn_config(front, access)
        server = HttpServer(config, gate, served, on_ready, http.drain_timeout_s)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)
        say(f"loading {model.model}")
        try:
            server.run(sockets=[listener])
        finally:
            served.stop()
    if server.failure is not None:
        raise server.failure
    if server.is_engine_lost:
        message = "the engine process has died and no restarts are left (--engine-restarts)"
        raise EngineLostError(message)


def _uvicorn_config(app: Front, access: AccessOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_CLOSING_S,
        ssl_certfile=access.tls_cert,
        ssl_keyfile=access.tls_key,
    )


@contextlib.contextmanager
def _listening(http: HttpOptions, access: AccessOptions) -> Iterator[socket.socket]:
    is_given = (http.host, http.port) != (HttpOptions.host, HttpOptions.port)
    if access.uds is not None and is_given:
        raise ConfigError("uds: replaces --host and --port; give one or the other")
    opened = unix_socket(Path(access.uds)) if access.uds is not None else _listen(http)
    with opened as listener:
        yield listener


def _listen(http: HttpOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    try:
        return socket.create_server((http.host, http.port), family=family, backlog=2048)
    except OSError as error:
        address = f"{http.host} port {http.port}"
        raise ConfigError(f"host: cannot listen on {address}: {error.strerror}") from None


def _announce(
    name: str, listener: socket.socket, access: AccessOptions, *, needs_key: bool
) -> None:
    scheme = "http" if access.tls_cert is None else "https"
    if listener.family == socket.AF_UNIX:
        address = f"unix:{access.uds}"
        curl = f"curl --unix-socket {access.uds} {scheme}://localhost"
    else:
        host, port = listener.getsockname()[:2]
        address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        curl = f"curl {address}"
    prompt = "memory (noun):" if name == WORDNET else "The capital of France is"
    body = f'{{"model": "{name}", "prompt": "{prompt}"}}'
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    say(f"serving {name} at {address}; try:")
    say(f"  {curl}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'")


def _warn_if_public(listener: socket.socket) -> None:
    if listener.family == socket.AF_UNIX:
        return
    host = listener.getsockname()[0]
    if not ipaddress.ip_address(host).is_loopback:
        logger.warning(
            "other machines can reach %s and need no API key; set one with --api-key-file", host
        )


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
