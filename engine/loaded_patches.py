"""The row patches that an engine has loaded, by the hash of their contents."""

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Protocol
from weakref import WeakValueDictionary

import torch

from engine.config import EngineConfig
from engine.errors import PatchBusyError, PatchRefusedError, RequestError
from engine.model.row_patches import PatchSet, RowPatch, ScaledPatch
from engine.request import PatchRef, PatchStatistics, PatchSummary
from memory_ops.patches.patch_counts import CountReader, PatchCounts


class PatchSource(Protocol):
    """Reads row patches of one model from folders."""

    def prepare(self) -> None:
        """Begin the work that the first load needs, in the background."""
        ...

    def load(
        self, folder: Path, check_size: Callable[[int, int], None]
    ) -> tuple[RowPatch, PatchSummary]:
        """Read and check the patch in a folder, and place it on the model's device.

        Args:
            folder: the patch folder; it must not be a symbolic link.
            check_size: gets the patch's rows and bytes before memory is allocated for them, and
                raises PatchRefusedError to refuse them.

        Raises:
            PatchRefusedError: the patch is not valid, or not made for this model.
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
        return len(self._alive)

    @property
    def num_bytes(self) -> int:
        """Bytes of all patches in memory."""
        with self._lock:
            return sum(patch.num_bytes for patch in self._alive.values())

    def prepare(self) -> None:
        """Begin the work that the first load needs, in the background."""
        if self._source is not None:
            self._source.prepare()

    def load(self, folder: Path, content_hash: str | None = None) -> PatchSummary:
        """Load the patch in a folder. A content that is loaded already takes its memory once more
        while it is read, which must fit within the limit too.

        Args:
            folder: the patch folder; it must not be a symbolic link.
            content_hash: the hash that the content must have; None accepts any.

        Raises:
            PatchBusyError: removed patches that requests still use take the memory that it needs.
            PatchRefusedError: the patch is invalid, not made for this model, or exceeds a limit.
        """
        if self._source is None:
            raise PatchRefusedError("this engine reads no row patches from folders")
        patch, summary = self._source.load(folder, self._check_size)
        if content_hash not in (None, summary.content_hash):
            found = f"{content_hash} became {summary.content_hash}"
            raise PatchRefusedError(f"{folder}: its content has changed: {found}")
        self.put(patch)
        return summary

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
        # equal contents are one patch, so that a plan that names them finds what it means
        with self._lock:
            known = self._alive.get(patch.content_hash)
            if known is None:
                if len(self._alive) >= self._limits.max_patches:
                    raise self._no_space_error(
                        f"--max-patches: {self._limits.max_patches} row patches are allowed, and as"
                        " many are loaded or still used by requests",
                        patch.num_bytes,
                    )
                self._taken.pop(patch.content_hash, None)
            self._loaded[patch.content_hash] = self._alive[patch.content_hash] = known or patch

    def remove(self, content_hash: str) -> None:
        """Refuse a patch to new requests; do nothing if it is not loaded."""
        self._loaded.pop(content_hash, None)

    def lease(self, refs: Sequence[PatchRef]) -> PatchSet:
        """The patches of a new request, which stay alive as long as the result.

        Raises:
            RequestError: one of them is not loaded.
        """
        found = [self._loaded.get(ref.content_hash) for ref in refs]
        missing = [ref.content_hash for ref, one in zip(refs, found, strict=True) if one is None]
        if missing:
            raise RequestError("memory_patches", f"patch {missing[0]} is not loaded")
        return self.of(refs)

    def of(self, refs: Sequence[PatchRef]) -> PatchSet:
        """The patches of a request that has a lease."""
        return tuple(ScaledPatch(self._alive[ref.content_hash], ref.scale) for ref in refs)

    def take_counts(self) -> tuple[PatchStatistics, ...]:
        """The row reads since the last call, of the patches in memory that had any."""
        with self._lock:
            alive = dict(self._alive.items())
            self._taken = {name: self._taken[name] for name in alive if name in self._taken}
        gained = []
        found = self._counts.read([patch.distinct_rows for patch in alive.values()])
        for content_hash, counts in zip(alive, map(PatchCounts._make, found), strict=True):
            reads, hits = self._taken.get(content_hash, (0, 0))
            if counts != (reads, hits):
                self._taken[content_hash] = counts
                gained.append(
                    PatchStatistics(content_hash, counts.reads - reads, counts.hits - hits)
                )
        return tuple(gained)

    def _check_size(self, num_rows: int, num_bytes: int) -> None:
        """Raise PatchRefusedError if a patch of this size exceeds a limit."""
        most = self._limits.max_patch_rows
        if num_rows > most:
            raise PatchRefusedError(
                f"--max-patch-rows: the patch has {num_rows} rows, but at most {most} are allowed;"
                " raise the limit"
            )
        left = self._limits.patch_bytes - self.num_bytes
        if num_bytes > left:
            taken, free, limit = (
                f"{size / 2**30:.3g}"
                for size in (num_bytes, max(left, 0), self._limits.patch_bytes)
            )
            raise self._no_space_error(
                f"--patch-memory-gib: the patch takes {taken} GiB, {free} of {limit} GiB is free",
                num_bytes,
            )

    def _no_space_error(self, problem: str, num_bytes: int) -> PatchRefusedError:
        """The error of a patch that does not fit: PatchBusyError if removed ones take its space."""
        loaded = list(self._loaded.values())
        left = self._limits.patch_bytes - sum(patch.num_bytes for patch in loaded)
        if len(loaded) < self._limits.max_patches and num_bytes <= left:
            return PatchBusyError(f"{problem}; requests still use removed patches; retry later")
        return PatchRefusedError(f"{problem}; remove a patch or raise the limit")
