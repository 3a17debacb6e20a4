"""A server on a unix socket, and the files that others left or use."""

import os
import socket

import httpx
import pytest

from engine.errors import ConfigError
from server.unix_socket import unix_socket
from tests.server.running import running


def test_a_stale_file_is_replaced_and_the_own_one_removed(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with unix_socket(path) as listener:
        assert listener.getsockname() == str(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_the_file_of_another_server_is_kept(tmp_path):
    path = tmp_path / "socket"
    with unix_socket(path):
        with pytest.raises(ConfigError, match="another process listens"), unix_socket(path):
            pass
        assert path.exists()
        path.unlink()
        replaced = socket.socket(socket.AF_UNIX)
        replaced.bind(str(path))
        # a new file must not get the inode of the removed one
        assert path.exists()
    replaced.close()


@pytest.mark.parametrize("kind", ["file", "folder", "missing folder", "long name"])
def test_an_unusable_path_is_named(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    elif kind == "missing folder":
        path = path / "y"
    else:
        path = tmp_path / ("x" * 200)
    with pytest.raises(ConfigError, match=f"^uds: {path}: "), unix_socket(path):
        pass
    assert kind != "file" or path.read_text() == "mine"


@pytest.mark.slow
def test_a_server_on_a_unix_socket_answers_and_removes_it(memory_plus_folder, tmp_path):
    path = tmp_path / "memplus.sock"

    def client(url):
        assert url == f"unix:{path}"
        transport = httpx.HTTPTransport(uds=str(path))
        return httpx.Client(transport=transport, base_url="http://localhost", timeout=60)

    options = ("--uds", str(path), "--access-log")
    with running(memory_plus_folder, *options, client=client) as server:
        assert server.complete(prompt="x", max_tokens=2).status_code == 200
        assert os.stat(path).st_mode & 0o022 == 0
        server.process.terminate()
        assert server.process.wait(timeout=60) == 0
        assert 'client="" ' in server.process.stderr.read()
    assert not path.exists()
