"""``memplus serve``: both processes, from the first line printed to a clean end."""

import signal
import sys
import time
from pathlib import Path
from types import FrameType

import uvicorn

from engine.config import EngineConfig
from engine.process import EngineProcess
from server.admission import Admission
from server.app import create_app
from server.completions import Service
from server.config import HttpOptions, ModelOptions, engine_settings
from server.engine_client import EngineClient
from server.metrics import Metrics
from weights.default_model import DEFAULT_MODEL
from weights.tokenizer import load_tokenizer

ENGINE_ENTRY = "server.engine_entry:main"


def serve(model: ModelOptions, engine: EngineConfig, http: HttpOptions) -> None:
    """Load the model in a process of its own, then answer HTTP until SIGINT or SIGTERM.

    Raises:
        CheckpointError: the model or its tokenizer cannot be read.
        EngineStartError: the engine could not be made.
    """
    settings = engine_settings(model, engine)
    signal.signal(signal.SIGTERM, _exit)
    process = EngineProcess(ENGINE_ENTRY, settings)
    _say(f"loading {model.model}")
    ready = process.start()
    try:
        metrics = Metrics()
        service = Service(
            model_name=http.served_model_name or _model_name(model.model),
            created=int(time.time()),
            tokenizer=load_tokenizer(settings.folder),
            limits=ready.limits,
            engine=EngineClient(process, metrics.observe_step),
            admission=Admission(
                engine.max_num_seqs + http.max_queued_requests,
                metrics.rejections.labels("queue_full").inc,
            ),
            metrics=metrics,
        )
        _run_http(service, http)
    finally:
        process.stop()


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, model_name: str) -> None:
        super().__init__(config)
        self._model_name = model_name

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.should_exit:
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        body = f'{{"model": "{self._model_name}", "prompt": "The capital of France is"}}'
        _say(f"serving {self._model_name} at {url}; try:")
        _say(f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'")


def _run_http(service: Service, http: HttpOptions) -> None:
    app = create_app(service, http.max_body_mib * 2**20)
    config = uvicorn.Config(
        app,
        host=http.host,
        port=http.port,
        log_level="warning",
        timeout_graceful_shutdown=http.shutdown_timeout_s,
    )
    # uvicorn ends gracefully at a signal, then raises it once more; by then it is answered
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore)
    _Server(config, service.model_name).run()


def _model_name(model: str) -> str:
    return model if model == DEFAULT_MODEL else Path(model).resolve().name


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
