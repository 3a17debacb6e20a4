"""The row patches that an engine has loaded, by the hash of their contents."""

from collections.abc import Sequence
from threading import Lock
from weakref import WeakValueDictionary

from engine.errors import RequestError
from engine.model.row_patches import PatchSet, RowPatch, ScaledPatch
from engine.request import PatchRef


class LoadedPatches:
    """Patches that requests may use. A patch that was removed stays as long as a request uses it.

    Any thread may call it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._loaded: dict[str, RowPatch] = {}
        self._alive: WeakValueDictionary[str, RowPatch] = WeakValueDictionary()

    @property
    def num_alive(self) -> int:
        """Patches in memory: those loaded, and those that requests still use."""
        return len(self._alive)

    def put(self, patch: RowPatch) -> None:
        """Let requests use a patch."""
        # equal contents are one patch, so that a plan that names them finds what it means
        with self._lock:
            patch = self._alive.setdefault(patch.content_hash, patch)
            self._loaded[patch.content_hash] = patch

    def remove(self, content_hash: str) -> None:
        """Let no further request use a patch; do nothing if it is not loaded."""
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
