"""Memory that ranks share: waits for ranks that have ended or do not answer."""

import os
import subprocess
import sys

import pytest
import torch

from engine.executors.parallel import shared_memory
from engine.executors.parallel.shared_memory import RankGoneError, SharedMemory

pytestmark = pytest.mark.skipif(not shared_memory.is_available(), reason="built without a compiler")


def test_a_rank_that_does_not_answer_is_given_up(tmp_path):
    SharedMemory.create(tmp_path, 2)
    mine = SharedMemory(tmp_path, 0, [os.getpid()] * 2, timeout_s=0)
    with pytest.raises(RankGoneError, match="did not answer within 0 s"):
        mine.exchange(torch.ones(3))


def test_a_rank_whose_process_has_ended_is_named(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    SharedMemory.create(tmp_path, 2)
    mine = SharedMemory(tmp_path, 0, [os.getpid(), ended.pid], timeout_s=600)
    with pytest.raises(RankGoneError, match="rank 1 has died"):
        mine.exchange(torch.ones(3))


def test_one_rank_exchanges_with_itself(tmp_path):
    SharedMemory.create(tmp_path, 1)
    alone = SharedMemory(tmp_path, 0, [os.getpid()], timeout_s=1)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        x = torch.arange(6).view(2, 3).to(dtype)
        assert torch.equal(alone.exchange(x), x[None])
    assert alone.exchange(torch.empty(0, 4)).shape == (1, 0, 4)
