"""Graphs cut into pieces: their order, and what becomes of a capture that fails."""

import warnings
from contextlib import contextmanager

import pytest
import torch

from engine.executors.cuda.graph_pieces import GraphPieces

EMPTY = "The CUDA Graph is empty. This usually means that the graph was attempted to be captured"


@pytest.fixture
def log(monkeypatch):
    """Fake graphs: what happens to each, in order."""
    log = []

    class Graph:
        def __init__(self) -> None:
            self.number = sum(entry.startswith("begin") for entry in log)

        def replay(self) -> None:
            log.append(f"replay {self.number}")

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert (pool, stream, capture_error_mode) == ("pool", "stream", "thread_local")
        log.append(f"begin {graph.number}")
        yield
        log.append(f"end {graph.number}")
        warnings.warn(EMPTY, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return log


def test_the_host_works_between_graphs_at_each_replay(log):
    pieces = GraphPieces("pool", "stream")
    with pieces.captured():
        log.append("kernel")
        pieces.cut(lambda: log.append("host"))
        pieces.cut(lambda: log.append("host again"))
    assert log == ["begin 0", "kernel", "end 0", "begin 1", "end 1", "begin 2", "end 2"]
    for _ in range(2):
        log.clear()
        pieces.replay()
        assert log == ["replay 0", "host", "replay 1", "host again", "replay 2"]


def test_a_failure_ends_the_capture(log):
    pieces = GraphPieces("pool", "stream")
    with pytest.raises(ValueError, match="no kernel"), pieces.captured():
        pieces.cut(lambda: None)
        raise ValueError("no kernel")
    assert log[-1] == "end 1"


def test_a_graph_that_cannot_begin_is_not_ended(log, monkeypatch):
    pieces = GraphPieces("pool", "stream")

    def fail():
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError), pieces.captured():
        monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
        pieces.cut(lambda: None)
    assert log == ["begin 0", "end 0"]
