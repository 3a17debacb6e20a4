"""The row patches that an engine has loaded, by the hash of their contents."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Lock
from typing import Protocol
from weakref import WeakValueDictionary

import torch

from engine.config import EngineConfig
from engine.errors import (
    PatchBusyError,
    PatchNotLoadedError,
    PatchRefusedError,
    RequestError,
)
from engine.model.row_patches import PatchSet, RowPatch, ScaledPatch
from engine.request import PatchRef, PatchStatistics, PatchSummary
from memory_ops.patches.patch_counts import CountReader, PatchCounts


class OpenedPatch(Protocol):
    """A patch in an open folder, made for the model; its content has not been read."""

    @property
    def num_rows(self) -> int:
        """Rows over all tables."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that it takes: ids, deltas and hash indexes."""
        ...

    def content_hash(self) -> str:
        """Hash the content, and keep none of it."""
        ...

    def read(self, find: Callable[[str], RowPatch | None]) -> RowPatch:
        """Read and check the patch, and place it on the model's device.

        Args:
            find: gets the content hash before memory for indexes or on a GPU is allocated, and
                returns the patch with this content if one is in memory.

        Raises:
            PatchNotLoadedError: the patch is not valid, or cannot be read now.
        """
        ...

    def summary(self, content_hash: str) -> PatchSummary:
        """The loaded patch, whose content has this hash."""
        ...


class PatchSource(Protocol):
    """Reads row patches of one model from folders."""

    def prepare(self) -> None:
        """Begin the work that the first load needs, in the background."""
        ...

    def open(self, folder: Path) -> AbstractContextManager[OpenedPatch]:
        """Open a patch folder, which must not be a symbolic link, and check it but for its content.

        Raises:
            PatchNotLoadedError: the patch is not valid, not made for this model, or cannot be read
                now.
        """
        ...


class LoadedPatches:
    """Patches that requests may use. A patch that was removed stays as long as a request uses it.

    Any thread may call it, but only one may add patches.
    """

    def __init__(
        self,
        limits: EngineConfig | None = None,
        source: PatchSource | None = None,
        device: torch.device | None = None,
    ) -> None:
        """``limits`` gives the number, rows and memory of the patches that ``source`` reads; they
        must be on ``device``, by default the CPU."""
        self._source = source
        self._limits = limits or EngineConfig()
        self._device = device or torch.device("cpu")
        self._lock = Lock()
        self._counts = CountReader()
        self._loaded: dict[str, RowPatch] = {}
        self._alive: WeakValueDictionary[str, RowPatch] = WeakValueDictionary()
        self._taken: dict[str, PatchCounts] = {}  # counts at the last ``take_counts``

    @property
    def num_alive(self) -> int:
        """Patches in memory: those loaded, and those that requests still use."""
        return len(self._in_memory())

    @property
    def num_bytes(self) -> int:
        """Bytes of all patches in memory."""
        return sum(patch.num_bytes for patch in self._in_memory())

    def prepare(self) -> None:
        """Begin the work that the first load needs, in the background."""
        if self._source is not None:
            self._source.prepare()

    def load(self, folder: Path, content_hash: str | None = None) -> PatchSummary:
        """Load the patch in a folder.

        If its limits leave no space for another patch, it is first hashed in parts: a content that
        is in memory already needs no space.

        Args:
            folder: the patch folder; it must not be a symbolic link.
            content_hash: the hash that the content must have; None accepts any.

        Raises:
            PatchBusyError: removed patches that requests still use take the memory that it needs.
            PatchRefusedError: the patch is invalid, not made for this model, or exceeds a limit.
            PatchFailedError: it cannot be read now, or memory for it is missing.
        """
        if self._source is None:
            raise PatchRefusedError("this engine reads no row patches from folders")

        def find(found: str) -> RowPatch | None:
            if content_hash not in (None, found):
                message = f"{folder}: its content has changed: {content_hash} became {found}"
                raise PatchRefusedError(message)
            with self._lock:
                return self._alive.get(found)

        with self._source.open(folder) as opened:
            self._check_rows(opened.num_rows)
            refusal = self._no_space_for(opened.num_bytes)
            if refusal is None:
                patch = opened.read(find)
            else:
                sizes = {patch.num_bytes for patch in self._in_memory()}
                known = find(opened.content_hash()) if opened.num_bytes in sizes else None
                if known is None:
                    raise refusal
                patch = known
            self.put(patch)
            return opened.summary(patch.content_hash)

    def put(self, patch: RowPatch) -> None:
        """Let requests use a patch; equal contents are one patch.

        Raises:
            PatchBusyError: as many patches as allowed are in memory, some of them removed.
            PatchRefusedError: as many patches as allowed are loaded, or this one is on another
                device than the model.
        """
        wrong = {str(rows.words.device) for rows in patch.distinct_rows} - {str(self._device)}
        if wrong:
            # kernels in graphs would read an address of another memory
            found = f"{patch.content_hash} is on {min(wrong)}"
            raise PatchRefusedError(f"row patch {found}, but the model is on {self._device}")
        with self._lock:
            known = self._alive.get(patch.content_hash)
            if known is None:
                if (refusal := self._too_many(patch.num_bytes)) is not None:
                    raise refusal
                self._taken.pop(patch.content_hash, None)
            # so that a content hash names one patch
            self._loaded[patch.content_hash] = self._alive[patch.content_hash] = known or patch

    def remove(self, content_hash: str) -> None:
        """Refuse a patch to new requests; do nothing if it is not loaded."""
        self._loaded.pop(content_hash, None)

    def lease(self, refs: Sequence[PatchRef]) -> PatchSet:
        """The patches of a new request, which stay in memory as long as the result.

        Raises:
            RequestError: one of them is not loaded.
        """
        leased = []
        for content_hash, scale in refs:
            patch = self._loaded.get(content_hash)
            if patch is None:
                raise RequestError("memory_patches", f"patch {content_hash} is not loaded")
            leased.append(ScaledPatch(patch, scale))
        return tuple(leased)

    def take_counts(self) -> tuple[PatchStatistics, ...]:
        """The row reads since the last call, of the patches in memory that had any.

        Reads of a patch that has left memory since the last call are lost.
        """
        alive = self._in_memory()
        names = {patch.content_hash for patch in alive}
        with self._lock:
            self._taken = {name: one for name, one in self._taken.items() if name in names}
        gained = []
        found = self._counts.read([patch.distinct_rows for patch in alive])
        for patch, counts in zip(alive, map(PatchCounts._make, found), strict=True):
            name = patch.content_hash
            reads, hits = self._taken.get(name, (0, 0))
            if counts != (reads, hits):
                self._taken[name] = counts
                gained.append(PatchStatistics(name, counts.reads - reads, counts.hits - hits))
        return tuple(gained)

    def _in_memory(self) -> list[RowPatch]:
        # every access to a weak dictionary may remove entries, even while a thread iterates
        with self._lock:
            return list(self._alive.values())

    def _check_rows(self, num_rows: int) -> None:
        most = self._limits.max_patch_rows
        if num_rows > most:
            raise PatchRefusedError(
                f"--max-patch-rows: the patch has {num_rows} rows, but at most {most} are allowed;"
                " raise the limit"
            )

    def _no_space_for(self, num_bytes: int) -> PatchNotLoadedError | None:
        """The error of another patch of this size if it would exceed a limit; None if not."""
        with self._lock:
            refusal = self._too_many(num_bytes)
        left = self._limits.patch_bytes - self.num_bytes
        if refusal is not None or num_bytes <= left:
            return refusal
        taken, free, limit = (
            f"{size / 2**30:.3g}" for size in (num_bytes, max(left, 0), self._limits.patch_bytes)
        )
        return self._no_space_error(
            f"--patch-memory-gib: the patch takes {taken} GiB, {free} of {limit} GiB is free",
            num_bytes,
        )

    def _too_many(self, num_bytes: int) -> PatchNotLoadedError | None:
        """The error of another patch of this size if as many as allowed are in memory. The caller
        holds the lock."""
        if len(self._alive) < self._limits.max_patches:
            return None
        return self._no_space_error(
            f"--max-patches: {self._limits.max_patches} row patches are allowed, and as many are"
            " loaded or still used by requests",
            num_bytes,
        )

    def _no_space_error(self, problem: str, num_bytes: int) -> PatchNotLoadedError:
        """The error of a patch that does not fit: PatchBusyError if removed ones take its space."""
        loaded = list(self._loaded.values())
        left = self._limits.patch_bytes - sum(patch.num_bytes for patch in loaded)
        if len(loaded) < self._limits.max_patches and num_bytes <= left:
            return PatchBusyError(f"{problem}; requests still use removed patches; retry later")
        return PatchRefusedError(f"{problem}; remove a patch or raise the limit")
