"""Limits of connections, requests and answers, with their command-line options."""

import math
from dataclasses import dataclass, field

from engine.errors import ConfigError


@dataclass(frozen=True)
class LimitOptions:
    """Limits on what clients can make the server hold, and for how long.

    Raises:
        ConfigError: a field is out of range.
    """

    max_connections: int = field(
        default=1024,
        metadata={
            "group": ("limits", "--max-connections 256 --request-timeout-s 120"),
            "help": "open connections, TLS handshakes included; idle ones are closed for new ones,"
            " else new ones get a 503",
        },
    )
    keep_alive_timeout_s: float = field(
        default=75.0, metadata={"help": "close a connection without requests for this long"}
    )
    header_timeout_s: float = field(
        default=10.0, metadata={"help": "longest time for a request's headers to arrive"}
    )
    max_header_kib: int = field(
        default=32, metadata={"help": "largest URL and headers of a request"}
    )
    stream_write_timeout_s: float = field(
        default=30.0,
        metadata={"help": "close it if the client reads nothing for this long"},
    )
    max_bodies_mib: int = field(
        default=256, metadata={"help": "request bodies in memory; more get a 503"}
    )
    max_admitted_tokens: int | None = field(
        default=None,
        metadata={
            "help": "prompt tokens plus max_tokens of all requests; more get a 503"
            " (default: max_model_len for every second place)"
        },
    )
    request_timeout_s: float = field(
        default=0.0,
        metadata={"help": "fail requests after this long (0: no limit)"},
    )
    allow_priority: bool = field(
        default=False, metadata={"help": "let clients set a request's priority"}
    )

    def __post_init__(self) -> None:
        for name in ("max_connections", "max_header_kib", "max_bodies_mib", "max_admitted_tokens"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name}: must be at least 1, not {number}")
        for name in ("keep_alive_timeout_s", "header_timeout_s", "stream_write_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: must be greater than 0, not {getattr(self, name)}")
        if not 0 <= self.request_timeout_s < math.inf:
            raise ConfigError(f"request_timeout_s: must be 0 or more, not {self.request_timeout_s}")

    def check_bodies(self, max_body_mib: int) -> None:
        """Raise ConfigError if one body may be larger than all of them together."""
        if self.max_bodies_mib < max_body_mib:
            raise ConfigError(f"max_bodies_mib: must be at least max_body_mib, {max_body_mib}")
