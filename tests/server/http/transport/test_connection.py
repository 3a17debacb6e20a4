"""Raw bytes over sockets to a small application: framing, limits, and connections that end."""

import asyncio
import contextlib
import json
import socket

import pytest
import uvicorn
from uvicorn.server import ServerState

from server.http.transport.connection import Connection
from server.http.transport.connection_table import IDLE_S, ConnectionTable
from server.http.transport.tls_listener import TlsHandshake, TlsListener
from server.limits import LimitOptions

HELLO = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: x\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
FOREVER = 1000.0


class Echo:
    """An application that answers with the request; ``/flood`` sends until the client leaves."""

    def __init__(self):
        self.left = asyncio.Event()

    async def __call__(self, scope, receive, send):
        if scope["path"] == "/refuse":  # without reading the body
            await self.answer(send, 413, b"no")
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                await self.answer(send, 400, b"")
                return
            body += message["body"]
            more = message["more_body"]
        if scope["path"] == "/wait":
            assert (await receive())["type"] == "http.disconnect"
            self.left.set()
        if scope["path"] == "/vanish":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            assert (await receive())["type"] == "http.disconnect"
            return
        if scope["path"] == "/fail":
            raise ValueError("a test")
        if scope["path"] in ("/stream", "/flood"):
            await self.stream(scope, receive, send)
            return
        known = {name: scope[name] for name in ("method", "path", "http_version")}
        shown = known | {"query": scope["query_string"].decode(), "body": body.decode()}
        shown["headers"] = [name.decode() for name, _ in scope["headers"]]
        await self.answer(send, 200, json.dumps(shown).encode())

    async def answer(self, send, status, body):
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def stream(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        count = 3
        watch = asyncio.create_task(receive())
        while count if scope["path"] == "/stream" else not watch.done():
            part = b"part;" if scope["path"] == "/stream" else bytes(65536)
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)
            count -= 1
        await send({"type": "http.response.body", "body": b""})
        watch.cancel()
        self.left.set()


class Clock:
    """Time that stands still until it is set, in seconds."""

    now = 0.0


class Served:
    """A listening server with the application, and the clock of its connection table."""

    def __init__(self, port, app, state, refused, clock):
        self.port, self.app, self.state, self.refused = port, app, state, refused
        self.clock = clock

    async def open(self):
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def talk(self, *parts, ends=False):
        """Send the parts; return everything until the server closes."""
        reader, writer = await self.open()
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if ends:
            writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer


@contextlib.asynccontextmanager
async def served(tls=None, **limits):
    """Serve; ``tls`` is an SSL context."""
    limits = {"keep_alive_timeout_s": FOREVER, "header_timeout_s": FOREVER} | limits
    options, refused = LimitOptions(**limits), []
    clock = Clock()
    table = ConnectionTable(options.max_connections, lambda: refused.append(1), lambda: clock.now)
    app, state = Echo(), ServerState()
    config = uvicorn.Config(app, lifespan="off", log_level="critical")
    config.load()

    def connection():
        return Connection(config, state, {}, limits=options, table=table)

    def handshake():
        return TlsHandshake(state, table, connection)

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if tls is not None:
        server = TlsListener(listener, tls, FOREVER, handshake)
    else:
        server = await asyncio.get_running_loop().create_server(connection, sock=listener)
    try:
        yield Served(port, app, state, refused, clock)
    finally:
        server.close()
        listener.close()
        for one in list(state.connections):
            one.abort()
        while state.connections or state.tasks:
            await asyncio.sleep(0)


def run(scenario, new_loop=None, **limits):
    async def with_server():
        async with served(**limits) as server:
            return await scenario(server)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(asyncio.wait_for(with_server(), 20))


def talk(*parts, ends=False, **limits):
    return run(lambda server: server.talk(*parts, ends=ends), **limits)


def answers(raw):
    """The (status, headers, body) of each response; bodies have lengths or chunks."""
    found = []
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:])
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            size = -1
            while size:
                line, _, raw = raw.partition(b"\r\n")
                size = int(line, 16)
                body, raw = body + raw[:size], raw[size + 2 :]
        else:
            length = int(headers.get("content-length", 0))
            body, raw = raw[:length], raw[length:]
        found.append((int(lines[0].split()[1]), headers, body))
    return found


def statuses(raw):
    return [status for status, _, _ in answers(raw)]


def bodies(raw):
    return [json.loads(body)["body"] for _, _, body in answers(raw)]


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(
    "request_bytes",
    [
        POST + b"Content-Length: 5\r\n\r\nhello",
        POST
        + b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\nhe\r\n3\r\nllo\r\n0\r\nX-Sum: 1\r\n\r\n",
        POST + H2C + b"Content-Length: 5\r\n\r\nhello",
        POST + H2C + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        POST + b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\nhello",
        b"\r\n" + POST + b"Expect: 100-CONTINUE\r\nContent-Length: 5\r\n\r\nhello",
        b"POST http://x/echo HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
def test_a_request_is_read_however_it_is_framed_and_split(request_bytes, size):
    raw = request_bytes * 2 + LAST
    pieces = [raw[start : start + size] for start in range(0, len(raw), size)]
    answer = talk(*pieces).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    assert bodies(answer) == ["hello", "hello", ""]
    shown = [json.loads(body) for _, _, body in answers(answer)]
    assert [one["path"] for one in shown] == ["/echo", "/echo", "/last"]
    assert not any({"x-sum", "upgrade"} & set(one["headers"]) for one in shown)


def test_what_follows_a_request_with_connection_close_is_ignored():
    assert statuses(talk(LAST + HELLO)) == [200]


def test_many_pipelined_requests_are_answered_in_order():
    many = b"".join(b"GET /%d HTTP/1.1\r\n\r\n" % number for number in range(3000))
    paths = [json.loads(body)["path"] for _, _, body in answers(talk(many, LAST))]
    assert paths == [*(f"/{number}" for number in range(3000)), "/last"]


@pytest.mark.parametrize("asked", [b"", b"Connection: keep-alive\r\n"])
def test_a_stream_for_http_1_0_has_no_chunks_and_ends_with_the_connection(asked):
    raw = talk(b"GET /stream HTTP/1.0\r\n%b\r\n" % asked)
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"chunked" not in head and b"connection: close" in head and body == b"part;" * 3


def test_http_1_0_keeps_alive_only_on_request():
    assert statuses(talk(b"GET /echo HTTP/1.0\r\n\r\n")) == [200]
    raw = talk(b"GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + LAST)
    assert [headers["connection"] for _, headers, _ in answers(raw)] == ["keep-alive", "close"]


def test_a_stream_is_chunked_and_the_connection_goes_on():
    assert answers(talk(b"GET /stream HTTP/1.1\r\n\r\n" + LAST))[0][2] == b"part;" * 3


@pytest.mark.parametrize("path", ["echo", "stream"])
def test_head_has_no_body(path):
    raw = talk(b"HEAD /%b HTTP/1.1\r\nConnection: close\r\n\r\n" % path.encode())
    assert raw.endswith(b"\r\n\r\n") and statuses(raw) == [200]


def test_100_continue_comes_only_if_the_body_is_wanted():
    async def scenario(server):
        reader, writer = await server.open()
        expecting = b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        writer.write(POST + expecting)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hello" + POST.replace(b"echo", b"refuse") + expecting)
        answer = await reader.read()
        writer.close()
        return answers(answer)

    (_, _, echoed), (status, headers, _) = run(scenario)
    assert json.loads(echoed)["body"] == "hello"
    assert status == 413 and headers["connection"] == "close"


def test_another_expectation_is_refused():
    assert statuses(talk(POST + b"Expect: 200-ok\r\nContent-Length: 0\r\n\r\n")) == [417]


def test_a_refused_body_may_still_be_sent_and_the_answer_is_read():
    big = bytes(5 << 20)
    raw = talk(b"POST /refuse HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(big), big, ends=True)
    assert statuses(raw) == [413] and b"connection: close" in raw


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /" + b"a" * 9000, 414),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 60_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"A" * 60_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 2000, 431),
        (b"\r\n" * 20_000, 431),
        (b"CONNECT x:80 HTTP/1.1\r\n\r\n", 405),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\na", 400),
        (POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Content-Length: -1\r\n\r\n", 400),
    ],
)
def test_requests_beyond_limits_or_not_valid_get_an_error(sent, status):
    ((found, headers, body),) = answers(talk(sent))
    assert found == status and headers["connection"] == "close"
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "wrong", [b"x\r\n", b"5\r\nhelloo", b"0\r\nA: " + b"a" * 60_000, b"0\r\n" + b"A: b\r\n" * 2000]
)
def test_a_body_that_turns_out_wrong_ends_its_request(wrong):
    ((status, headers, _),) = answers(talk(POST + b"Transfer-Encoding: chunked\r\n\r\n" + wrong))
    assert status == 400 and headers["connection"] == "close"


def test_options_of_everything_is_answered():
    assert statuses(talk(b"OPTIONS * HTTP/1.1\r\nConnection: close\r\n\r\n")) == [200]


def test_slow_headers_get_408_and_idle_connections_are_closed():
    assert statuses(talk(b"GET / HTTP/1.1\r\nA:", header_timeout_s=0.01)) == [408]
    assert talk(keep_alive_timeout_s=0.01) == b""
    assert talk(b"\r\n", keep_alive_timeout_s=0.01) == b""
    assert statuses(talk(HELLO, keep_alive_timeout_s=0.01)) == [200]
    assert statuses(talk(HELLO + b"GET", header_timeout_s=0.01)) == [200, 408]


def test_a_client_that_leaves_is_noticed():
    async def scenario(server):
        for leaves in (lambda w: w.close(), lambda w: w.write_eof()):
            server.app.left.clear()
            _, writer = await server.open()
            writer.write(b"GET /wait HTTP/1.1\r\n\r\n")
            while not server.state.tasks:
                await asyncio.sleep(0)
            leaves(writer)
            await server.app.left.wait()
            assert server.app.left.is_set()
            writer.close()

    run(scenario)


def test_a_short_answer_reaches_a_client_that_ended_its_side():
    assert statuses(talk(HELLO, ends=True)) == [200]


def test_a_stream_that_ends_because_its_client_ended_its_side_is_no_error(caplog):
    assert talk(b"GET /vanish HTTP/1.1\r\n\r\n", ends=True).startswith(b"HTTP/1.1 200")
    assert not caplog.records


def test_a_stream_that_nobody_reads_is_cut():
    async def scenario(server):
        reader, writer = await server.open()
        writer.write(b"GET /flood HTTP/1.1\r\n\r\n")
        await server.app.left.wait()
        assert not server.state.connections and not reader.at_eof()
        writer.close()

    run(scenario, stream_write_timeout_s=0.05)


def test_idle_connections_make_way_and_active_ones_stay():
    async def scenario(server):
        idle = [await server.open() for _ in range(2)]
        while len(server.state.connections) < 2:
            await asyncio.sleep(0)
        server.clock.now = IDLE_S
        active, writer = await server.open()  # one idle connection is closed for it
        writer.write(b"GET /wait HTTP/1.1\r\n\r\n")
        assert await idle[0][0].read() == b""
        while not server.state.tasks:
            await asyncio.sleep(0)
        other, second = await server.open()
        assert await idle[1][0].read() == b""
        second.write(b"GET /wait HTTP/1.1\r\n\r\n")
        while len(server.state.tasks) < 2:
            await asyncio.sleep(0)
        assert not server.refused
        refused = [await server.talk() for _ in range(3)]
        assert len(server.refused) == 3
        for raw in refused:
            ((status, headers, _),) = answers(raw)
            assert status == 503 and headers["retry-after"] == "1"
        assert not server.app.left.is_set()
        for one in (writer, second, idle[0][1], idle[1][1]):
            one.close()
        await server.app.left.wait()
        del active, other
        while server.state.tasks:
            await asyncio.sleep(0)
        assert statuses(await server.talk(LAST)) == [200]

    run(scenario, max_connections=2)


def test_a_burst_of_connections_beyond_the_limit_is_answered_without_exception():
    # they are accepted together, before any of their requests is read
    async def scenario(server):
        found = await asyncio.gather(*(server.talk(LAST) for _ in range(9)))
        assert sorted(status for raw in found for status in statuses(raw)) == 2 * [200] + 7 * [503]
        assert len(server.refused) == 7

    run(scenario, max_connections=2)


def test_refused_connections_do_not_pile_up():
    closed = []

    class Refused:
        def abort(self):
            closed.append(self)

    table = ConnectionTable(1, lambda: None)
    assert table.add(Refused())
    refused = [Refused() for _ in range(1000)]
    assert not any(map(table.add, refused))
    assert closed == refused[: len(closed)] and 800 < len(closed) < 1000


def test_a_failing_application_is_answered_with_500():
    raw = talk(b"GET /fail HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert statuses(raw) == [500] and b"internal error" in raw


def test_shutdown_ends_idle_connections_and_active_ones_after_their_answer():
    async def scenario(server):
        idle, one = await server.open()
        busy, two = await server.open()
        two.write(POST + b"Content-Length: 1\r\n\r\n")
        while not server.state.tasks or len(server.state.connections) < 2:
            await asyncio.sleep(0)
        for connection in list(server.state.connections):
            connection.shutdown()
        assert await idle.read() == b""
        two.write(b"a")
        assert b"connection: close" in await busy.read()
        one.close()
        two.close()

    run(scenario)
