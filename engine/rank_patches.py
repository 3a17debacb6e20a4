"""A source of row patches for a tensor-parallel model, whose ranks each keep some columns."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.loaded_patches import OpenedPatch, PatchSource
from engine.model.row_patches import RowPatch
from engine.request import PatchSummary


class RankPatches:
    """Reads whole patches from a source, and shares each between the ranks; see ``PatchSource``."""

    def __init__(self, source: PatchSource, share: Callable[[RowPatch], RowPatch]) -> None:
        """``share`` gives each rank its columns of a patch on the CPU, and returns rank 0's."""
        self._source, self._share = source, share

    def prepare(self) -> None:
        self._source.prepare()

    @contextmanager
    def open(self, folder: Path) -> "Iterator[_OpenedRankPatch]":
        with self._source.open(folder) as opened:
            yield _OpenedRankPatch(opened, self._share)


class _OpenedRankPatch:
    """An opened patch that is shared when it is read; see ``OpenedPatch``."""

    def __init__(self, opened: OpenedPatch, share: Callable[[RowPatch], RowPatch]) -> None:
        self._opened, self._share = opened, share

    @property
    def num_rows(self) -> int:
        return self._opened.num_rows

    @property
    def num_bytes(self) -> int:
        """Bytes on all ranks together."""
        return self._opened.num_bytes

    def content_hash(self) -> str:
        return self._opened.content_hash()

    def read(self, find: Callable[[str], RowPatch | None]) -> RowPatch:
        shared: list[RowPatch] = []

        def find_shared(content_hash: str) -> RowPatch | None:
            found = find(content_hash)
            shared.extend([] if found is None else [found])
            return found

        patch = self._opened.read(find_shared)
        return shared[0] if shared else self._share(patch)

    def summary(self, content_hash: str) -> PatchSummary:
        return self._opened.summary(content_hash)
