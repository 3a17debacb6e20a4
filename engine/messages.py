"""Messages between the engine process and its parent, besides requests and outputs."""

from typing import NamedTuple

from engine.errors import PatchNotLoadedError, PatchRefusedError
from engine.request import PatchSummary, Request, RequestLimits, TableReport


class Abort(NamedTuple):
    """Cancel this request."""

    request_id: str


class DescribeMemory(NamedTuple):
    """Send a ``MemoryReport``."""


class LoadPatch(NamedTuple):
    """Load the row patch in a folder, and send ``PatchLoaded``.

    Attributes:
        key: names the answer.
        folder: the absolute path. Its last component must not be a symbolic link.
        content_hash: the hash that the content must have; None accepts any.
    """

    key: str
    folder: str
    content_hash: str | None = None


class UnloadPatch(NamedTuple):
    """Refuse a row patch to new requests; those that have it keep it."""

    content_hash: str


Message = Request | Abort | DescribeMemory | LoadPatch | UnloadPatch


class EngineReady(NamedTuple):
    """The engine is loaded and accepts requests."""

    limits: RequestLimits


class EngineRefused(NamedTuple):
    """The engine could not be made; ``message`` tells the user why.

    ``is_failure`` means that the machine failed, and not a setting or the model.
    """

    message: str
    is_failure: bool = False


class MemoryReport(NamedTuple):
    """The value tables and the reads of their rows, or the reason why they are not known."""

    tables: tuple[TableReport, ...] = ()
    error: str | None = None


class PatchLoaded(NamedTuple):
    """The loaded row patch, or the reason why it is not loaded.

    Attributes:
        kind: the class of the error.
    """

    key: str
    summary: PatchSummary | None = None
    error: str | None = None
    kind: type[PatchNotLoadedError] = PatchRefusedError


class Heartbeat(NamedTuple):
    """The process is alive; ``stalled_s`` is that of ``engine.progress``."""

    stalled_s: float
