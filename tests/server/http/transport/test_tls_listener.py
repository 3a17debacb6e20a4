"""TLS handshakes over sockets: they are counted, evicted and followed by HTTP."""

import asyncio
import contextlib
import socket
import ssl

import pytest
import uvloop

from server.http.transport.connection_table import IDLE_S
from tests.server.http.transport.test_connection import LAST, run, statuses
from tests.server.test_access import self_signed

LOOPS = (asyncio.new_event_loop, uvloop.new_event_loop)


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    """The server's and the client's SSL context."""
    certificate, key = self_signed(tmp_path_factory.mktemp("tls"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=certificate)


async def ask(server, tls, request=LAST):
    """Send a request over TLS; return the head of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=tls)
    writer.write(request)
    try:
        return await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.transport.abort()


def request_with_handshake(port, tls):
    """Send a request in the same piece as the end of the handshake; return the answer."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls_object = tls.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        while True:
            try:
                tls_object.do_handshake()
                break
            except ssl.SSLWantReadError:
                client.sendall(outgoing.read())
                incoming.write(client.recv(65536))
        tls_object.write(LAST)
        client.sendall(outgoing.read())
        answer = b""
        while received := client.recv(65536):
            incoming.write(received)
            with contextlib.suppress(ssl.SSLWantReadError):
                while part := tls_object.read(65536):
                    answer += part
                break  # the server has closed its side
        return answer


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_request_may_come_with_the_end_of_the_handshake(contexts, new_loop):
    for_server, for_client = contexts

    async def scenario(server):
        raw = await asyncio.to_thread(request_with_handshake, server.port, for_client)
        assert statuses(raw) == [200]
        while server.state.connections:
            await asyncio.sleep(0)

    run(scenario, new_loop, tls=for_server)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_unfinished_handshakes_are_counted_and_make_way(contexts, new_loop):
    for_server, for_client = contexts

    async def scenario(server):
        silent = []
        for number in range(5):
            silent.append(await server.open())
            if number >= 2:  # the longest idle one is closed for the new one
                assert await silent[number - 2][0].read() == b""
            while len(server.state.connections) < min(number + 1, 2):
                await asyncio.sleep(0)
            server.clock.now += IDLE_S
        assert len(server.state.connections) == 2
        assert b" 200 " in await ask(server, for_client)
        assert await silent[3][0].read() == b""
        assert not server.refused
        for connection in list(server.state.connections):
            connection.shutdown()
        assert await silent[4][0].read() == b""
        for _, writer in silent:
            writer.close()

    run(scenario, new_loop, tls=for_server, max_connections=2)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_full_server_answers_503_after_the_handshake(contexts, new_loop):
    for_server, for_client = contexts

    async def scenario(server):
        busy = asyncio.create_task(ask(server, for_client, b"GET /wait HTTP/1.1\r\n\r\n"))
        while not server.state.tasks:
            await asyncio.sleep(0)
        for count in (1, 2):
            assert b" 503 " in await ask(server, for_client)
            assert len(server.refused) == count
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)

    run(scenario, new_loop, tls=for_server, max_connections=1)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_client_that_speaks_no_tls_is_disconnected(contexts, new_loop):
    async def scenario(server):
        assert b"HTTP" not in await server.talk(LAST)
        while server.state.connections:
            await asyncio.sleep(0)

    run(scenario, new_loop, tls=contexts[0])
