"""The row patches of the engine process: loads, removes and, after a restart, reloads them."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from engine.errors import PatchFailedError, PatchRefusedError
from engine.messages import LoadPatch, PatchLoaded, UnloadPatch
from engine.process import EngineLostError
from engine.request import PatchSummary

logger = logging.getLogger(__name__)
# before each round of loads after a restart; failures may be a lack of memory or files
_ROUND_PAUSES_S = (0.0, 1.0, 5.0)


@dataclass(frozen=True)
class _Load:
    """A patch that is being loaded.

    Attributes:
        content_hash: the hash that the content must have, if it is a reload.
        removed: contents that the engine removes after this load.
    """

    folder: str
    content_hash: str | None
    answer: "asyncio.Future[PatchSummary]"
    removed: set[str] = field(default_factory=set)


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
        self._is_dead = False

    async def load(self, folder: Path) -> PatchSummary:
        """Load the patch in a folder.

        Raises:
            EngineLostError: the engine has died.
            PatchBusyError: removed patches that requests still use take the memory that it needs.
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
            self._remove(content_hash)

    def answer(self, message: PatchLoaded) -> None:
        """Take the engine's answer to a load."""
        load = self._loads.pop(message.key, None)
        if load is None:
            return  # the engine was given up meanwhile
        is_wanted = not load.answer.cancelled()
        if message.summary is None:
            if is_wanted:
                load.answer.set_exception(message.kind(message.error))
            return
        found = message.summary.content_hash
        if is_wanted and load.content_hash is None:
            if found in load.removed:
                self._send_load(load)  # the last other load of this content was taken back
                return
            self._folders.setdefault(found, Counter())[load.folder] += 1
        if is_wanted:
            load.answer.set_result(message.summary)
        elif found not in self._folders:
            self._remove(found)  # nobody else will

    def engine_died(self) -> None:
        """Fail the loads in flight, and all further ones until ``reload``. The patches are kept."""
        self._is_dead = True
        loads = list(self._loads.values())
        self._loads.clear()
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
        missing = {content: list(folders) for content, folders in self._folders.items()}
        for pause_s in _ROUND_PAUSES_S:
            count = sum(map(bool, missing.values()))  # the others were refused
            if not count:
                break
            if pause_s:
                logger.warning("row patches: %d are loaded again in %g s", count, pause_s)
            await asyncio.sleep(pause_s)
            for content_hash, folders in list(missing.items()):
                if content_hash not in self._folders:
                    del missing[content_hash]  # it was removed meanwhile
                elif await self._reload(content_hash, folders):
                    del missing[content_hash]
        if self._is_dead:
            raise _lost()
        for content_hash in missing:
            # it may have been removed meanwhile
            if self._folders.pop(content_hash, None) is not None:
                on_lost(content_hash)

    async def _reload(self, content_hash: str, folders: list[str]) -> bool:
        """Load a patch again from one of its folders, of which those drop out that are refused;
        False if none has it."""
        for folder in list(folders):
            try:
                await self._ask(folder, content_hash)
                return True
            except PatchFailedError as error:
                logger.error("row patch %s: the new engine cannot load it: %s", content_hash, error)
            except PatchRefusedError as error:
                logger.error("row patch %s: the new engine refuses it: %s", content_hash, error)
                folders.remove(folder)
        return False

    def _ask(self, folder: str, content_hash: str | None = None) -> "asyncio.Future[PatchSummary]":
        """The engine's answer; EngineLostError if the engine is dead already."""
        if self._is_dead:
            raise _lost()
        load = _Load(folder, content_hash, asyncio.get_running_loop().create_future())
        self._send_load(load)
        return load.answer

    def _send_load(self, load: _Load) -> None:
        load.removed.clear()
        key = str(next(self._keys))
        self._loads[key] = load
        self._send(LoadPatch(key, load.folder, load.content_hash))

    def _remove(self, content_hash: str) -> None:
        """Remove a content from the engine, which carries out messages in order."""
        self._send(UnloadPatch(content_hash))
        for load in self._loads.values():
            load.removed.add(content_hash)


def _lost() -> EngineLostError:
    return EngineLostError("the engine process has died")
