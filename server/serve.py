"""``memplus serve``: starts and stops the engine process and the HTTP server."""

import contextlib
import gc
import ipaddress
import logging
import resource
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import cast

import uvicorn

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.process import EngineLostError
from server.access import AccessOptions
from server.config import HttpOptions, SupervisionOptions, environment_api_keys
from server.http.app import create_app
from server.http.front import Front
from server.http.gate import Gate
from server.http.service import Service
from server.http.transport.connection import Connection
from server.http.transport.connection_table import ConnectionTable
from server.http_server import HttpServer
from server.limits import LimitOptions
from server.listener import listen
from server.logs import say
from server.model_options import ModelOptions
from server.monitoring import MonitoringOptions
from server.node_options import NodeSettings
from server.patch_options import PatchOptions
from server.served_model import ServedModel
from server.unix_socket import unix_socket
from weights.models.named_models import WORDNET

logger = logging.getLogger(__name__)
# time for responses to reach their clients after the last request has ended
_CLOSING_S = 1
# open files besides connections, and sockets that are accepted before one is evicted
_OTHER_FILES, _ACCEPTED_AT_ONCE = 256, 2048


def serve(
    model: ModelOptions,
    engine: EngineConfig,
    patches: PatchOptions,
    http: HttpOptions,
    limits: LimitOptions,
    supervision: SupervisionOptions,
    access: AccessOptions,
    monitoring: MonitoringOptions,
    nodes: NodeSettings | None = None,
) -> None:
    """Load the model in an engine process and answer HTTP requests until SIGINT or SIGTERM, or
    until the engine process has died and no restarts are left, so that a supervisor can restart it.

    Raises:
        ChatTemplateError: the model's chat template is not valid.
        CheckpointError: the model or its tokenizer cannot be read.
        ConfigError: the server cannot listen on the address, a limit cannot be kept, or a key,
            certificate or row patch is not valid.
        EngineLostError: the engine process has died and no restarts are left.
        EngineStartError: the engine could not be built.
    """
    signal.signal(signal.SIGTERM, _exit)
    _allow_files(limits.max_connections)
    keys = access.keys(environment_api_keys())
    access.check_tls()
    served = ServedModel(model, engine, http, patches, limits, supervision, monitoring, nodes)
    gate = Gate()

    async def on_ready(service: Service) -> None:
        await service.patches.load_first()
        # the loaded objects stay, and a full collection of them would stop all streams for 0.1 s
        gc.collect()
        gc.freeze()
        gate.open(create_app(service, http.max_body_mib * 2**20, http.body_timeout_s, http.ui))
        _announce(service.model_name, listener, access, needs_key=bool(keys))
        if monitoring.log_interval_s:
            await served.activity.run(monitoring.log_interval_s)

    with _listening(http, access) as listener:
        if not keys:
            _warn_if_public(listener)
        front = Front(gate, access, keys, access_log=monitoring.access_log)
        rejected = served.metrics.rejections.labels("too_many_connections").inc
        connections = ConnectionTable(limits.max_connections, rejected)
        config = _uvicorn_config(front, access, limits, connections)
        server = HttpServer(config, gate, served, on_ready, http, limits, connections)
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


def _uvicorn_config(
    app: Front, access: AccessOptions, limits: LimitOptions, connections: ConnectionTable
) -> uvicorn.Config:
    protocol = partial(Connection, limits=limits, table=connections)
    return uvicorn.Config(
        app,
        http=cast(type[Connection], protocol),
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
    opened = (
        unix_socket(Path(access.uds)) if access.uds is not None else listen(http.host, http.port)
    )
    with opened as listener:
        yield listener


def _allow_files(max_connections: int) -> None:
    """Raise this process's limit of open files, so that all connections fit."""
    needed = max_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"max_connections: {max_connections} need {needed} open files, but `ulimit -Hn` is"
            f" {hard}; raise that limit or use at most {hard - _OTHER_FILES}"
        )
    wanted = needed + _ACCEPTED_AT_ONCE
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
