"""CUDA graphs of one step, cut where the host has to work before the step goes on."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

Work = Callable[[], None]


class GraphPieces:
    """Graphs and the host's work between them, in their order. All use one pool of memory.

    Tensors of a graph may be used in later ones of the same step: replays keep the order.
    """

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self._pool, self._stream = pool, stream
        self._pieces: list[Work] = []
        self._current: tuple[torch.cuda.CUDAGraph, AbstractContextManager[None]] | None = None

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Capture what is launched on the stream, which must be the current one."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    def cut(self, work: Work) -> None:
        """End a graph, let ``work`` run after it in each replay, and begin the next graph."""
        self._end()
        self._pieces.append(work)
        self._begin()

    def replay(self) -> None:
        """Launch the graphs, and run the host's work between them."""
        for piece in self._pieces:
            piece()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # with the default, calls of other threads, such as nccl's, make a capture fail
        context = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        context.__enter__()
        self._current = graph, context

    def _end(self) -> None:
        current, self._current = self._current, None
        if current is None:
            return  # the next graph could not begin
        graph, context = current
        with warnings.catch_warnings():
            # a layer may launch nothing between the start and the end of its lookup
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            context.__exit__(None, None, None)
        self._pieces.append(graph.replay)
