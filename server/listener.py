"""Opens the socket on which the server listens."""

import socket

from engine.errors import ConfigError

_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening socket at an IPv4 or IPv6 address, or at a name of this machine.

    ``::`` stands for all addresses, those of IPv4 included. A name with addresses of both kinds
    stands for its IPv4 address.

    Raises:
        ConfigError: the address is not one of this machine, the port is taken, or the machine has
            no IPv6.
    """
    address = f"{host} port {port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        families = {family for family, *_ in found}
        if socket.AF_INET in families:
            return socket.create_server((host, port), backlog=_BACKLOG)
        if not socket.has_dualstack_ipv6():
            reason = "this machine has no IPv6; use an IPv4 address such as 0.0.0.0"
            raise ConfigError(f"host: cannot listen on {address}: {reason}")
        return socket.create_server(
            (host, port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
        )
    except (OSError, UnicodeError) as error:  # idna cannot encode some names
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"host: cannot listen on {address}: {reason}") from None
