"""Access options: malformed values, certificates, and a server with TLS on all addresses."""

import asyncio
import socket
import ssl
import subprocess
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import httpx
import pytest
import uvicorn

from engine.errors import ConfigError
from server.access import AccessOptions
from server.config import HttpOptions
from server.http.gate import Gate
from server.http.transport.connection_table import ConnectionTable
from server.http_server import HttpServer
from server.limits import LimitOptions
from server.serve import _warn_if_public
from tests.server.running import running


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cors_origin": ("example.org",)}, "cors_origin"),
        ({"cors_origin": ("https://example.org/",)}, "cors_origin"),
        ({"root_path": "api"}, "root_path"),
        ({"root_path": "/api/"}, "root_path"),
        ({"tls_key": "key.pem"}, "tls_key"),
    ],
)
def test_malformed_options_are_named(options, named):
    with pytest.raises(ConfigError, match=f"^{named}: "):
        AccessOptions(**options)


def self_signed(folder, *options: str) -> tuple[str, str]:
    """A certificate for localhost and its private key, as files."""
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-out", certificate, "-keyout", key, *(options or ["-nodes"])]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def test_unusable_certificates_are_named(tmp_path):
    for name in ("own", "other", "locked"):
        (tmp_path / name).mkdir()
    certificate, key = self_signed(tmp_path / "own")
    _, other = self_signed(tmp_path / "other")
    locked, locked_key = self_signed(tmp_path / "locked", "-passout", "pass:word")
    AccessOptions().check_tls()
    AccessOptions(tls_cert=certificate, tls_key=key).check_tls()
    both = tmp_path / "both.pem"
    both.write_bytes(Path(key).read_bytes() + Path(certificate).read_bytes())
    AccessOptions(tls_cert=str(both)).check_tls()
    for files, named in (
        ((f"{tmp_path}/none", key), f"tls_cert: {tmp_path}/none: No such file"),
        ((certificate, f"{tmp_path}/none"), f"tls_key: {tmp_path}/none: No such file"),
        ((certificate, other), "cannot be used: KEY_VALUES_MISMATCH"),
        ((certificate, None), f"private key in {certificate}: cannot be used"),
        ((locked, locked_key), f"private key in {locked_key}: cannot be used"),
        ((key, key), f"tls_cert: {key} with"),
    ):
        with pytest.raises(ConfigError) as raised:
            AccessOptions(tls_cert=files[0], tls_key=files[1]).check_tls()
        assert named in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_server_with_tls_serves_the_metrics_of_vllm(memory_plus_folder, tmp_path):
    certificate, key = self_signed(tmp_path)

    def client(url):
        assert url.startswith("https://0.0.0.0:")
        trusted = ssl.create_default_context(cafile=certificate)
        local = url.replace("0.0.0.0", "127.0.0.1")
        return httpx.Client(verify=trusted, base_url=local, timeout=60)

    options = ("--tls-cert", certificate, "--tls-key", key, "--host", "0.0.0.0")
    options += ("--metrics-prefix", "vllm:", "--served-model-name", "mine")
    with running(memory_plus_folder, *options, client=client) as server:
        assert server.complete(prompt="x", max_tokens=2).status_code == 200
        # dashboards for vLLM choose the model by this label
        assert 'vllm:num_requests_running{model_name="mine"}' in server.http.get("/metrics").text
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url.replace("https", "http"))
        server.process.terminate()
        errors = server.process.stderr.read()
        assert server.process.wait(timeout=60) == 0 and "Traceback" not in errors


def test_a_client_that_begins_no_handshake_is_disconnected(tmp_path):
    certificate, key = self_signed(tmp_path)
    config = uvicorn.Config(Gate(), ssl_certfile=certificate, ssl_keyfile=key, log_config=None)
    config.load()
    table = ConnectionTable(1, Mock())
    limits = LimitOptions(header_timeout_s=0.01)
    server = HttpServer(config, Gate(), Mock(), AsyncMock(), HttpOptions(), limits, table)

    async def scenario(listener):
        await server.startup([listener])
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        assert await reader.read() == b""
        writer.close()
        server.servers[0].close()
        await server.servers[0].wait_closed()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        asyncio.run(asyncio.wait_for(scenario(listener), 30))


def test_an_unprotected_public_address_is_warned_about(caplog):
    for host, is_public in (("0.0.0.0", True), ("127.0.0.1", False)):
        caplog.clear()
        with socket.create_server((host, 0)) as listener:
            _warn_if_public(listener)
        assert (f"machines can reach {host} and need no API key" in caplog.text) == is_public
