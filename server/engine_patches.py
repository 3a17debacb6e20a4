"""The row patches of the engine process: loads, removes and, after a restart, reloads them."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from engine.errors import PatchRefusedError
from engine.messages import LoadPatch, PatchLoaded, UnloadPatch
from engine.process import EngineLostError
from engine.request import PatchSummary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Load:
    """A patch that is being loaded; ``content_hash`` is set if it is a reload."""

    folder: str
    content_hash: str | None
    answer: "asyncio.Future[PatchSummary]"


class EnginePatches:
    """The row patches that an engine process has loaded, by content hash.

    The engine loads contents once, whatever folders they are in.
    """

    def __init__(self, send: Callable[[LoadPatch | UnloadPatch], None]) -> None:
        """``send`` sends a message to the current process."""
        self._send = send
        self._keys = count()
        self._loads: dict[str, _Load] = {}
        self._folders: dict[str, dict[str, None]] = {}  # of each content, in order of arrival
        self._unused: set[str] = set()

    async def load(self, folder: Path) -> PatchSummary:
        """Load the patch in a folder; PatchRefusedError, or EngineLostError if the engine dies."""
        return await self._ask(str(folder))

    def unload(self, content_hash: str) -> None:
        """Let no further request use a patch, whatever folders it was loaded from."""
        if self._folders.pop(content_hash, None) is not None:
            self._unused.add(content_hash)
            self._unload_unused()

    def answer(self, message: PatchLoaded) -> None:
        """Take the engine's answer to a load."""
        load = self._loads.pop(message.key, None)
        if load is None:
            return  # the engine was given up meanwhile
        is_wanted = not load.answer.cancelled()
        if message.summary is None:
            if is_wanted:
                load.answer.set_exception(PatchRefusedError(message.error))
        else:
            found = message.summary.content_hash
            if is_wanted:
                load.answer.set_result(message.summary)
            # a patch that was removed while it was reloaded stays removed
            if is_wanted and (load.content_hash is None or found in self._folders):
                self._folders.setdefault(found, {})[load.folder] = None
            if found not in self._folders:
                self._unused.add(found)
        self._unload_unused()

    def engine_died(self) -> None:
        """Fail the loads in flight. The patches are kept for ``reload``."""
        loads = list(self._loads.values())
        self._loads.clear()
        self._unused.clear()
        for load in loads:
            if not load.answer.done():
                load.answer.set_exception(EngineLostError("the engine process has died"))

    async def reload(self, on_lost: Callable[[str], None]) -> None:
        """Load all patches into a new engine process.

        ``on_lost`` gets the content hash of each patch that none of its folders has any longer.

        Raises:
            EngineLostError: the new process has died.
        """
        for content_hash in list(self._folders):
            for folder in list(self._folders.get(content_hash, ())):
                try:
                    await self._ask(folder, content_hash)
                    break
                except PatchRefusedError as error:
                    logger.error("row patch %s: the new engine refuses it: %s", content_hash, error)
                    if content_hash in self._folders:
                        del self._folders[content_hash][folder]
            if not self._folders.get(content_hash, True):
                del self._folders[content_hash]
                on_lost(content_hash)

    async def _ask(self, folder: str, content_hash: str | None = None) -> PatchSummary:
        load = _Load(folder, content_hash, asyncio.get_running_loop().create_future())
        key = str(next(self._keys))
        self._loads[key] = load
        self._send(LoadPatch(key, folder, content_hash))
        return await load.answer

    def _unload_unused(self) -> None:
        """Remove unused contents, unless a load in flight may turn out to be one of them."""
        self._unused -= self._folders.keys()
        if self._loads:
            return
        for content_hash in self._unused:
            self._send(UnloadPatch(content_hash))
        self._unused.clear()
