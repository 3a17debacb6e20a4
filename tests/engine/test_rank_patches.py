"""The patch source of a tensor-parallel model."""

from contextlib import contextmanager
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.loaded_patches import LoadedPatches
from engine.model.row_patches import RowPatch
from engine.rank_patches import RankPatches
from engine.request import PatchSummary
from memory_ops.patches.patched_rows import PatchedRows


class OneFolder:
    """A source with one patch, which counts its calls."""

    def __init__(self):
        rows = PatchedRows(torch.arange(3), torch.randn(3, 8))
        self.patch = RowPatch("a" * 64, {0: rows})
        self.num_rows, self.num_bytes = 3, self.patch.num_bytes
        self.prepared = 0

    def prepare(self):
        self.prepared += 1

    @contextmanager
    def open(self, folder):
        yield self

    def content_hash(self):
        return self.patch.content_hash

    def read(self, find):
        return find(self.patch.content_hash) or self.patch

    def summary(self, content_hash):
        return PatchSummary(content_hash, self.num_rows, self.num_bytes, {}, {})


def test_a_content_is_shared_between_the_ranks_once():
    source, shared = OneFolder(), []

    def share(patch):
        shared.append(patch)
        return RowPatch(patch.content_hash, patch.layers)

    patches = LoadedPatches(EngineConfig(max_patches=1), RankPatches(source, share))
    patches.prepare()
    for _ in range(2):
        summary = patches.load(Path("folder"))
    assert shared == [source.patch] and source.prepared == 1
    assert summary.content_hash == "a" * 64 and patches.num_alive == 1
    assert patches._loaded["a" * 64] is not source.patch
