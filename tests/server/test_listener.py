"""The listening socket: IPv4, IPv6, both at once, and addresses that are refused."""

import socket

import pytest

from engine.errors import ConfigError
from server import listener
from server.listener import listen

needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")


def reaches(listening: socket.socket, host: str) -> bool:
    try:
        with socket.create_connection((host, listening.getsockname()[1]), timeout=10):
            return True
    except OSError:
        return False


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", {"127.0.0.1"}),
        ("0.0.0.0", {"127.0.0.1"}),
        ("localhost", {"127.0.0.1"}),
        pytest.param("::", {"127.0.0.1", "::1"}, marks=needs_ipv6),
        pytest.param("0::0", {"127.0.0.1", "::1"}, marks=needs_ipv6),
        pytest.param("::1", {"::1"}, marks=needs_ipv6),
        pytest.param("::ffff:127.0.0.1", {"127.0.0.1"}, marks=needs_ipv6),
    ],
)
def test_each_host_is_reached_at_its_addresses(host, reached):
    with listen(host, 0) as listening:
        found = {other for other in ("127.0.0.1", "::1") if reaches(listening, other)}
    assert found == reached


def test_without_ipv6_its_addresses_are_refused_and_others_work(monkeypatch):
    monkeypatch.setattr(listener.socket, "has_dualstack_ipv6", lambda: False)
    with pytest.raises(ConfigError, match=r"host: .*:: port 0: this machine has no IPv6; use"):
        listen("::", 0)
    with listen("0.0.0.0", 0) as listening:
        assert reaches(listening, "127.0.0.1")


@pytest.mark.parametrize(
    "host", ["203.0.113.1", "[::1", "no such name", "a" * 300, "\0", "1.2.3.4.5"]
)
def test_addresses_of_other_machines_and_nonsense_are_refused(host):
    with pytest.raises(ConfigError, match="host: cannot listen on"):
        listen(host, 0)


def test_a_taken_port_is_refused():
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port}: Address already in use"):
            listen("127.0.0.1", port)
