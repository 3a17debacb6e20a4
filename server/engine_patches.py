"""The row patches of the engine process: loads, removes and, after a restart, reloads them."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from engine.errors import PatchFailedError, PatchRefusedError
from engine.messages import LoadPatch, PatchLoaded, UnloadPatch
from engine.process import EngineLostError
from engine.request import PatchSummary

logger = logging.getLogger(__name__)
# before each attempt to load a patch again; failures may be a lack of memory or files
_ATTEMPT_PAUSES_S = (0.0, 1.0, 5.0)


@dataclass(frozen=True)
class _Load:
    """A patch that is being loaded; ``content_hash`` is set if it is a reload."""

    folder: str
    content_hash: str | None
    answer: "asyncio.Future[PatchSummary]"


class EnginePatches:
    """The row patches that an engine process has loaded, by content hash.

    The engine loads contents once, whatever folders they are in. Each load of a folder has one
    ``unload``; after the last one of a content the engine removes it.
    """

    def __init__(self, send: Callable[[LoadPatch | UnloadPatch], None]) -> None:
        """``send`` sends a message to the current process."""
        self._send = send
        self._keys = count()
        self._loads: dict[str, _Load] = {}
        self._folders: dict[str, Counter[str]] = {}  # of each content, with their loads
        self._unused: set[str] = set()
        self._is_dead = False

    async def load(self, folder: Path) -> PatchSummary:
        """Load the patch in a folder.

        Raises:
            EngineLostError: the engine has died.
            PatchFailedError: it could not be loaded now, but may be valid.
            PatchRefusedError: it is invalid or exceeds a limit.
        """
        answer = self._ask(str(folder))
        try:
            return await answer
        except asyncio.CancelledError:
            if not answer.cancelled() and answer.exception() is None:
                self.unload(answer.result().content_hash, folder)  # nobody else will
            raise

    def unload(self, content_hash: str, folder: Path) -> None:
        """Take back one load of a folder. If it was the last one of a content, the engine refuses
        the content to new requests."""
        folders = self._folders.get(content_hash)
        if folders is None:
            return  # the content was lost
        folders[str(folder)] -= 1
        self._folders[content_hash] = +folders
        if not self._folders[content_hash]:
            del self._folders[content_hash]
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
                kind = PatchFailedError if message.is_failure else PatchRefusedError
                load.answer.set_exception(kind(message.error))
        else:
            found = message.summary.content_hash
            if is_wanted:
                load.answer.set_result(message.summary)
                if load.content_hash is None:
                    self._folders.setdefault(found, Counter())[load.folder] += 1
            # nobody waits for it, or it was removed while it was reloaded
            if found not in self._folders:
                self._unused.add(found)
        self._unload_unused()

    def engine_died(self) -> None:
        """Fail the loads in flight, and all further ones until ``reload``. The patches are kept."""
        self._is_dead = True
        loads = list(self._loads.values())
        self._loads.clear()
        self._unused.clear()
        for load in loads:
            if not load.answer.done():
                load.answer.set_exception(_lost())

    async def reload(self, on_lost: Callable[[str], None]) -> None:
        """Load all patches into a new engine process, which has just started.

        ``on_lost`` gets the content hash of each patch that none of its folders has any longer.

        Raises:
            EngineLostError: the new process has died.
        """
        self._is_dead = False
        for content_hash in list(self._folders):
            for folder in list(self._folders.get(content_hash, ())):
                if await self._reload(folder, content_hash):
                    break
            else:
                # it may have been removed meanwhile
                if self._folders.pop(content_hash, None) is not None:
                    on_lost(content_hash)
        if self._is_dead:
            raise _lost()

    async def _reload(self, folder: str, content_hash: str) -> bool:
        """Load a patch again from one of its folders, and retry failures; False if it is lost."""
        for pause_s in _ATTEMPT_PAUSES_S:
            await asyncio.sleep(pause_s)
            try:
                await self._ask(folder, content_hash)
                return True
            except PatchFailedError as error:
                logger.error("row patch %s: the new engine cannot load it: %s", content_hash, error)
            except PatchRefusedError as error:
                logger.error("row patch %s: the new engine refuses it: %s", content_hash, error)
                break
        return False

    def _ask(self, folder: str, content_hash: str | None = None) -> "asyncio.Future[PatchSummary]":
        """The engine's answer; EngineLostError if the engine is dead already."""
        if self._is_dead:
            raise _lost()
        load = _Load(folder, content_hash, asyncio.get_running_loop().create_future())
        key = str(next(self._keys))
        self._loads[key] = load
        self._send(LoadPatch(key, folder, content_hash))
        return load.answer

    def _unload_unused(self) -> None:
        """Remove unused contents, unless a load in flight may turn out to be one of them."""
        self._unused -= self._folders.keys()
        if self._loads:
            return
        for content_hash in self._unused:
            self._send(UnloadPatch(content_hash))
        self._unused.clear()


def _lost() -> EngineLostError:
    return EngineLostError("the engine process has died")
