"""The gate: what a server answers while it loads, drains and ends."""

import asyncio

import httpx
from starlette.responses import PlainTextResponse, StreamingResponse

from server.http.gate import Gate
from tests.server.http.test_app import build


class SlowApp:
    """Answers after the test allows it; a stream sends one event before that."""

    def __init__(self):
        self.go_on = asyncio.Event()

    async def __call__(self, scope, receive, send):
        if scope["path"] != "/stream":
            await self.go_on.wait()
            await PlainTextResponse("done")(scope, receive, send)
            return

        async def events():
            yield b"begun "
            await self.go_on.wait()
            yield b"done"

        await StreamingResponse(events())(scope, receive, send)


def client(gate):
    transport = httpx.ASGITransport(app=gate)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def refused(answer, message):
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    assert answer.json() == {
        "error": {"message": message, "type": "server_error", "param": None, "code": None}
    }


def test_while_the_model_loads_the_server_is_alive_but_not_ready():
    async def scenario():
        gate = Gate()
        async with client(gate) as http:
            assert (await http.get("/health")).json() == {"status": "ok"}
            for path in ("/ready", "/v1/models", "/metrics", "/nowhere"):
                refused(await http.get(path), "the model is loading")
            _, _, app = build()
            gate.open(app)
            assert (await http.get("/ready")).json() == {"status": "ready"}
            assert (await http.get("/v1/models")).status_code == 200

    asyncio.run(scenario())


def test_a_draining_server_refuses_new_requests_and_finishes_running_ones():
    async def scenario():
        gate, app = Gate(), SlowApp()
        gate.open(app)
        async with client(gate) as http:
            running = [asyncio.create_task(http.get(path)) for path in ("/", "/stream")]
            while gate.num_running < 2:
                await asyncio.sleep(0)
            gate.drain()
            answer = await http.post("/v1/completions", json={})
            refused(answer, "the server is shutting down")
            assert answer.headers["connection"] == "close"
            refused(await http.get("/ready"), "the server is shutting down")
            app.go_on.set()
            assert [(await one).text for one in running] == ["done", "begun done"]
            assert gate.num_running == 0
            for path in ("/health", "/metrics"):
                assert (await http.get(path)).status_code == 200

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_at_the_end_requests_without_a_response_get_a_503_and_streams_continue():
    async def scenario():
        gate, app = Gate(), SlowApp()
        gate.open(app)
        async with client(gate) as http:
            running = [asyncio.create_task(http.get(path)) for path in ("/", "/stream")]
            while gate.num_running < 2:
                await asyncio.sleep(0)
            for _ in range(10):
                await asyncio.sleep(0)  # the stream begins
            gate.drain()
            gate.end()
            refused(await running[0], "the server is shutting down")
            app.go_on.set()
            assert (await running[1]).text == "begun done" and gate.num_running == 0

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_completion_that_is_ended_is_aborted_in_the_engine():
    process, service, app = build()
    gate = Gate()
    gate.open(app)

    async def scenario():
        async with client(gate) as http:
            call = asyncio.create_task(http.post("/v1/completions", json={"prompt": "a"}))
            while not process.sent:
                await asyncio.sleep(0)
            gate.end()
            refused(await call, "the server is shutting down")

    asyncio.run(asyncio.wait_for(scenario(), 60))
    request, abort = process.sent
    assert abort.request_id == request.request_id
    assert not any(service.admission.used.values())
