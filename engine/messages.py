"""Messages between the engine process and its parent, besides requests and outputs."""

from typing import NamedTuple

from engine.request import Request, RequestLimits, TableReport


class Abort(NamedTuple):
    """Cancel this request."""

    request_id: str


class DescribeMemory(NamedTuple):
    """Send a ``MemoryReport``."""


Message = Request | Abort | DescribeMemory


class EngineReady(NamedTuple):
    """The engine is loaded and accepts requests."""

    limits: RequestLimits


class EngineRefused(NamedTuple):
    """The engine could not be made; ``message`` tells the user why."""

    message: str


class MemoryReport(NamedTuple):
    """The value tables and the reads of their rows, or the reason why they are not known."""

    tables: tuple[TableReport, ...] = ()
    error: str | None = None


class Heartbeat(NamedTuple):
    """The process is alive; ``stalled_s`` is that of ``engine.progress``."""

    stalled_s: float
