"""The loop of a rank: it drops patches that rank 0 has freed."""

import weakref
from socket import socketpair

import numpy as np
import pytest
import torch

from engine.executors.parallel.channel import Channel
from engine.executors.parallel.messages import AddPatch, RankMessage, RankReady, RunForward
from engine.executors.parallel.rank_loop import run_rank
from engine.model.row_patches import RowPatch
from memory_ops.patches.patched_rows import PatchedRows


class PatchWatch:
    """An executor that computes nothing; notes which of the patches that it saw are in memory."""

    device = torch.device("cpu")

    def __init__(self):
        self.alive, self._seen = [], {}

    def logits(self, batch):
        for patch, _ in (use for uses in batch.patches for use in uses):
            self._seen[patch.content_hash] = weakref.ref(patch)
        self.alive.append([name for name, seen in self._seen.items() if seen() is not None])


def added(number, freed=()):
    """The message of a patch whose hash is its number."""
    rows = PatchedRows(torch.arange(3), torch.randn(3, 8))
    return AddPatch.of(number, RowPatch(str(number), {0: rows}), range(4, 8), freed)


def forward(patches, freed=()):
    """The message of one token with these patches."""
    one = np.zeros(1, np.int64)
    uses = [[(number, 1.0) for number in patches]]
    return RunForward(one, one, (0, 1), one, (1,), [(0,)], one, uses, freed)


@pytest.mark.parametrize(
    "messages",
    [
        [added(0), forward([0]), added(1, [0]), forward([1])],
        [added(0), added(1), forward([0]), forward([1], [0])],
        # a number of a patch that never came is ignored
        [added(0), forward([0]), added(1, [7]), forward([1], [8, 0])],
    ],
    ids=["with-a-patch", "with-a-forward", "unknown"],
)
def test_a_freed_patch_is_dropped(messages):
    executor = PatchWatch()
    ours, theirs = socketpair()
    with theirs:
        with ours:
            for message in messages:
                Channel(ours, RankReady).send(message)
        run_rank(executor, Channel(theirs, RankMessage))
    assert executor.alive == [["0"], ["1"]]
