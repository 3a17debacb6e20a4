"""Loads and removes row patches in a thread, in order, while the engine runs steps."""

import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from engine.errors import PatchFailedError, PatchNotLoadedError
from engine.messages import LoadPatch, PatchLoaded, UnloadPatch
from engine.request import PatchSummary

logger = logging.getLogger(__name__)


class PatchEngine(Protocol):
    """The part of ``engine.engine.Engine`` that this thread calls."""

    def load_patch(self, folder: Path, content_hash: str | None = None) -> PatchSummary: ...
    def unload_patch(self, content_hash: str) -> None: ...


class PatchLoading:
    """The thread that loads the row patches of one engine."""

    def __init__(self, engine: PatchEngine, send: Callable[[PatchLoaded], None]) -> None:
        """``send`` sends an answer; OSError means that nobody waits for it."""
        self._engine, self._send = engine, send
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="patches")

    def submit(self, message: LoadPatch | UnloadPatch) -> None:
        """Carry out a message after those before it; each load is answered."""
        if isinstance(message, UnloadPatch):
            self._thread.submit(self._engine.unload_patch, message.content_hash)
        else:
            self._thread.submit(self._load, message)

    def close(self) -> None:
        """Drop the messages that were not carried out; a load that has begun goes on."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self, message: LoadPatch) -> None:
        try:
            summary = self._engine.load_patch(Path(message.folder), message.content_hash)
            answer = PatchLoaded(message.key, summary)
        except PatchNotLoadedError as error:
            answer = PatchLoaded(message.key, error=str(error), kind=type(error))
        except Exception as error:
            logger.exception("a row patch could not be loaded")
            problem = f"{type(error).__name__} while the patch was loaded"
            answer = PatchLoaded(message.key, error=problem, kind=PatchFailedError)
        with contextlib.suppress(OSError):  # the engine's loop notices it too
            self._send(answer)
