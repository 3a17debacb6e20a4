"""HTTP routes with a fake engine: aborts, streaming, admission and health."""

import asyncio
import json
import tomllib
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.messages import Abort
from engine.request import EngineStatistics, Request, RequestLimits, StepOutput, TokenOutput
from server.config import SupervisionOptions
from server.engine_client import EngineClient
from server.http.admission import Admission
from server.http.app import create_app
from server.http.grammar_checker import GrammarChecker
from server.http.metrics import Metrics
from server.http.served_patches import ServedPatches
from server.http.service import Service
from server.limits import LimitOptions
from server.patch_options import PatchOptions
from server.version import VERSION
from tests.models import byte_tokenizer
from weights.checkpoints.tokenizer import JsonTokenizer


class SilentProcess:
    """A fake process that records messages and never answers."""

    def __init__(self):
        self.sent = []

    def send(self, *messages):
        self.sent += messages


def build(chat_template=None, max_model_len=100, **options):
    process, metrics = SilentProcess(), Metrics("mock")
    engine = EngineClient(process, metrics.observe_step, SupervisionOptions(), SilentProcess)
    limits = RequestLimits(vocab_size=260, max_model_len=max_model_len)
    service = Service(
        model_name="mock",
        created=0,
        tokenizer=JsonTokenizer(byte_tokenizer()),
        chat_template=chat_template,
        limits=limits,
        engine=engine,
        admission=Admission(
            {"prompts": 2, "tokens": 1000, "body_bytes": 2**20},
            lambda reason: metrics.rejections.labels(reason).inc(),
        ),
        metrics=metrics,
        options=LimitOptions(**options),
        grammars=GrammarChecker(Path("no-folder"), limits),
        patches=ServedPatches(engine, metrics.patches, PatchOptions(), 0),
    )
    return process, service, create_app(service, 2**20, 30)


def answer(service, output):
    """Deliver an output as if the engine process had sent it."""
    service.engine.handle(StepOutput((output,), EngineStatistics(num_running=1)))


def ended(service):
    """The number of ended answers by reason, from the metrics."""
    (family,) = (
        family
        for family in text_string_to_metric_families(service.metrics.render().decode())
        if family.name == "memplus:request_success"
    )
    totals = [sample for sample in family.samples if sample.name.endswith("_total")]
    return {sample.labels["finished_reason"]: sample.value for sample in totals}


async def post(app, body, client, sent=None, method="POST", path="/v1/completions"):
    """Call the ASGI application; ``client`` runs until the client disconnects."""
    sent = [] if sent is None else sent
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("test", 1),
        "server": ("test", 80),
    }
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await client()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_before_its_first_token_is_aborted(streamed):
    process, service, app = build()

    async def leave():
        while not process.sent:
            await asyncio.sleep(0)

    asyncio.run(post(app, {"prompt": ["a", "b"], "stream": streamed}, leave))
    requests, aborts = process.sent[:2], process.sent[2:]
    assert all(isinstance(request, Request) for request in requests)
    assert sorted(aborts, key=lambda abort: abort.request_id) == [
        Abort(request.request_id) for request in requests
    ]
    assert not any(service.admission.used.values()) and ended(service) == {"abort": 2}


def test_an_event_is_sent_before_the_next_token_is_made():
    process, service, app = build()
    sent, seen = [], []

    async def scenario():
        left = asyncio.Event()
        call = asyncio.create_task(post(app, {"prompt": "a", "stream": True}, left.wait, sent))
        while not process.sent:
            await asyncio.sleep(0)
        for count in (1, 2, 3):
            answer(service, TokenOutput(process.sent[0].request_id, (64 + count,)))
            while sum(message["type"] == "http.response.body" for message in sent) < count:
                await asyncio.sleep(0)
            seen.append(sent[-1]["body"])
        left.set()  # disconnect in the middle of the stream
        await call

    asyncio.run(asyncio.wait_for(scenario(), 60))
    texts = [json.loads(body.removeprefix(b"data: "))["choices"][0]["text"] for body in seen]
    assert texts == [byte_tokenizer().decode([64 + count]) for count in (1, 2, 3)]
    assert sent[0]["status"] == 200
    assert process.sent[1:] == [Abort(process.sent[0].request_id)]
    assert not any(service.admission.used.values())


def test_a_late_output_of_an_aborted_request_is_dropped():
    process, service, app = build()

    async def leave():
        while not process.sent:
            await asyncio.sleep(0)

    asyncio.run(post(app, {"prompt": "a"}, leave))
    answer(service, TokenOutput(process.sent[0].request_id, (65,), "length"))
    assert ended(service) == {"abort": 1}


def test_places_in_the_queue_are_released():
    process, service, app = build()

    async def never():
        await asyncio.Event().wait()

    other = service.admission.open(lambda: None)
    other.enlarge("prompts", 1)
    other.keep()
    sent = asyncio.run(post(app, {"prompt": ["a", "b"]}, never))
    other.close()
    assert sent[0]["status"] == 503 and process.sent == []
    assert not any(service.admission.used.values())


@pytest.mark.parametrize("path", ["/v1/completions", "/ready"])
def test_without_a_living_engine_the_answer_is_503(path):
    process, service, app = build()
    service.engine.is_alive = False

    async def never():
        await asyncio.Event().wait()

    method = "GET" if path == "/ready" else "POST"
    start, body = asyncio.run(post(app, {"prompt": "a"}, never, method=method, path=path))
    assert start["status"] == 503 and (b"retry-after", b"5") in start["headers"]
    assert json.loads(body["body"])["error"]["type"] == "server_error"
    assert process.sent == [] and not any(service.admission.used.values())


def test_health_is_a_503_only_if_the_engine_is_gone_for_good():
    _, service, app = build()

    async def statuses():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [(await client.get(path)).status_code for path in ("/health", "/ready")]

    assert asyncio.run(statuses()) == [200, 200]
    service.engine.is_alive = False  # it is restarted
    assert asyncio.run(statuses()) == [200, 503]
    service.engine.is_lost = True
    assert asyncio.run(statuses()) == [503, 503]


def test_the_version_is_that_of_the_package():
    _, _, app = build()
    sent = asyncio.run(post(app, None, None, method="GET", path="/version"))
    assert json.loads(sent[1]["body"]) == {"version": VERSION}
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "server.version.VERSION" and app.openapi()["info"]["version"] == VERSION


def test_engine_request_ids_start_with_the_completion_id():
    process, service, app = build()

    async def finish():
        while len(process.sent) < 2:
            await asyncio.sleep(0)
        for request in process.sent:
            answer(service, TokenOutput(request.request_id, (65,), "length"))
        await asyncio.Event().wait()

    sent = asyncio.run(post(app, {"prompt": ["a", "b"]}, finish))
    name = json.loads(sent[1]["body"])["id"]
    assert [request.request_id for request in process.sent] == [f"{name}-0", f"{name}-1"]


def test_health_is_a_503_while_a_table_is_lost():
    _, service, app = build()

    async def health():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/health")

    assert asyncio.run(health()).status_code == 200
    lost = EngineStatistics(lost_tables=("a: was changed", "b: no row can be read"))
    service.engine.handle(StepOutput((), lost))
    answer = asyncio.run(health())
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert error["message"] == "value tables are lost: a: was changed; b: no row can be read"
    assert (error["type"], error["code"]) == ("server_error", "table_lost")
    service.engine.handle(StepOutput((), EngineStatistics()))
    assert asyncio.run(health()).status_code == 200
